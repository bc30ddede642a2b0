"""Reads a CLIP that open_clip trained, and writes ours so that `open_clip.create_model` loads it.

Does not need the package open_clip: weights are safetensors or a state dict (never any other
pickle), and the model's shape is in `open_clip_config.json` or in the weights. CLIP numbers its
tokens from 0, with start and end last; ours begin with padding, start and end, so the rows of the
embedding move.
Legend: D width, E embedding dimensions.
"""

import hashlib
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import TypedDict

from infra.errors import CallerError, DataError
from training.models import clip as clip_model
from training.models.clip import CLIP
from training.models.tokenizer import END, SPECIAL, START, Tokenizer
from training.models.transformer import HEAD_WIDTH, heads_of
from training.sections.clip_section import ClipConfig
from training.sections.tokenizer_section import TokenizerConfig

PIXEL_MEAN, PIXEL_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # of OpenAI's and open_clip's models
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
WEIGHT_FILES = (WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
UNCLIP_FILES = ("weights.safetensors", "config.json", "tokenizer.json")
MERGE_FILES = ("merges.txt", "bpe_simple_vocab_16e6.txt.gz")
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
"""Channels of a head by the width of the image tower, where they are not 64: ViT-H, g and bigG."""
HUB = "hf-hub:"
PUBLISHED = {
    "ViT-B-32/openai": "timm/vit_base_patch32_clip_224.openai",
    "ViT-B-16/openai": "timm/vit_base_patch16_clip_224.openai",
    "ViT-L-14/openai": "timm/vit_large_patch14_clip_224.openai",
    "ViT-B-32/laion2b_s34b_b79k": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "ViT-B-16/laion2b_s34b_b88k": "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    "ViT-L-14/laion2b_s32b_b82k": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "ViT-H-14/laion2b_s32b_b79k": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "ViT-g-14/laion2b_s34b_b88k": "laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
    "ViT-bigG-14/laion2b_s39b_b160k": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "ViT-B-32/datacomp_xl_s13b_b90k": "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
    "ViT-B-16/datacomp_xl_s13b_b90k": "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K",
    "ViT-L-14/datacomp_xl_s13b_b90k": "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K",
}
"""Repositories of open_clip's `MODEL/TAG` on the Hugging Face hub."""

# Fields of `open_clip_config.json` and the only value that our towers support (None: any).
VISION: dict[str, Any] = {
    "image_size": None,
    "layers": None,
    "width": None,
    "patch_size": None,
    "head_width": None,
    "mlp_ratio": None,
}
VISION |= {
    "ls_init_value": None,
    "patch_dropout": None,
    "pool_type": "tok",
    "no_ln_pre": False,
    "final_ln_after_pool": False,
}
TEXT: dict[str, Any] = {
    "context_length": None,
    "vocab_size": None,
    "width": None,
    "heads": None,
    "layers": None,
}
TEXT |= {
    "mlp_ratio": 4.0,
    "embed_cls": False,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_bias": False,
    "proj_type": "linear",
}
PIXELS = {
    "resize_mode": {"shortest", "longest", "squash", None},
    "interpolation": {"bicubic", "bilinear", "random", None},
}
MODEL = {
    "embed_dim",
    "quick_gelu",
    "vision_cfg",
    "text_cfg",
    "init_logit_scale",
    "init_logit_bias",
    "custom_text",
}

BLOCK = {
    "norm_1.weight": "ln_1.weight", "norm_1.bias": "ln_1.bias", "norm_2.weight": "ln_2.weight",
    "norm_2.bias": "ln_2.bias",
    "attention.qkv.weight": "attn.in_proj_weight", "attention.qkv.bias": "attn.in_proj_bias",
    "attention.out.weight": "attn.out_proj.weight", "attention.out.bias": "attn.out_proj.bias",
    "mlp.0.weight": "mlp.c_fc.weight", "mlp.0.bias": "mlp.c_fc.bias",
    "mlp.2.weight": "mlp.c_proj.weight", "mlp.2.bias": "mlp.c_proj.bias",
}  # fmt: skip
OUTSIDE = {
    "image.patches.weight": "visual.conv1.weight", "image.class_token": "visual.class_embedding",
    "image.positions": "visual.positional_embedding", "image.project.weight": "visual.proj",
    "image.norm_in.weight": "visual.ln_pre.weight", "image.norm_in.bias": "visual.ln_pre.bias",
    "image.norm_out.weight": "visual.ln_post.weight", "image.norm_out.bias": "visual.ln_post.bias",
    "text.tokens.weight": "token_embedding.weight", "text.positions": "positional_embedding",
    "text.norm.weight": "ln_final.weight", "text.norm.bias": "ln_final.bias",
    "text_project.weight": "text_projection", "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}  # fmt: skip
TRANSPOSED = {"image.project.weight", "text_project.weight"}


class Source(TypedDict):
    """Where a pretrained CLIP comes from."""

    pretrained: str
    """Its name in the recipe."""
    weights: str
    """Name of the file."""
    weights_sha256: str


def read(config: ClipConfig, tokens: TokenizerConfig) -> tuple[CLIP, Tokenizer, Source]:
    """Return the CLIP that `config.pretrained` names, its tokenizer, and its source.

    The folder of another run's `clip` stage is accepted
    too, with either tower and its own vocabulary. Raises CallerError if the model is missing or is
    not of a kind that our towers support, DataError if the weights are broken.
    """
    folder, weights = find(config.pretrained)
    if weights.name == UNCLIP_FILES[0] and _is_unclip_folder(folder):
        model, tokenizer = clip_model.load(folder)
        model.config = model.config.model_copy(update={"pretrained": config.pretrained})
        return model, tokenizer, _source(config, weights)
    state = read_weights(weights)
    if (folder / CONFIG).exists():
        shape = _from_config(config, json.loads((folder / CONFIG).read_text()), folder / CONFIG)
    else:
        shape = _from_weights(config, state, weights)
    resolved, context, vocab_size = shape
    tokenizer = Tokenizer.from_merges(find_merges(tokens.merges, folder), context)
    if tokenizer.vocab_size != vocab_size + 1:
        raise CallerError(
            f"[clip] pretrained = {config.pretrained!r} has {vocab_size:,} tokens, but CLIP's own "
            f"vocabulary has {tokenizer.vocab_size - 1:,}: choose a model with that vocabulary"
        )
    model = CLIP(resolved, vocab_size + 1, context)
    load(model, state, weights)
    return model.eval(), tokenizer, _source(config, weights)


def _source(config: ClipConfig, weights: Path) -> Source:
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"pretrained": config.pretrained, "weights": weights.name, "weights_sha256": digest}


def find(pretrained: str) -> tuple[Path, Path]:
    """Return the folder and the weights of a pretrained model, from disk or from the hub."""
    path = Path(pretrained).expanduser()
    if path.is_file():
        return path.parent, path
    if path.is_dir():
        if _is_unclip_folder(path):
            return path, path / UNCLIP_FILES[0]
        for name in WEIGHT_FILES:
            if (path / name).is_file():
                return path, path / name
        raise CallerError(
            f"[clip] pretrained = {pretrained!r}: the folder has none of {', '.join(WEIGHT_FILES)}"
        )
    repository = (
        pretrained.removeprefix(HUB) if pretrained.startswith(HUB) else PUBLISHED.get(pretrained)
    )
    if repository is None:
        raise CallerError(
            f"[clip] pretrained = {pretrained!r} is neither a file nor a folder, nor "
            f"{HUB}ORGANISATION/NAME, "
            f"nor one of {', '.join(PUBLISHED)}"
        )
    return _from_hub(repository, pretrained)


def _is_unclip_folder(folder: Path) -> bool:
    return all((folder / name).is_file() for name in UNCLIP_FILES)


def _from_hub(repository: str, pretrained: str) -> tuple[Path, Path]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        listed = Path(
            snapshot_download(repository, allow_patterns=[CONFIG, *MERGE_FILES, *WEIGHT_FILES[:2]])
        )
        for name in WEIGHT_FILES[:2]:
            if (listed / name).is_file():
                return listed, listed / name
        listed = Path(
            snapshot_download(repository, allow_patterns=[CONFIG, *MERGE_FILES, WEIGHT_FILES[2]])
        )
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CallerError(
            f"[clip] pretrained = {pretrained!r} cannot be downloaded ({reason}): set it to a path "
            "of the weights"
        ) from None
    if not (listed / WEIGHT_FILES[2]).is_file():
        raise CallerError(
            f"[clip] pretrained = {pretrained!r}: the repository has none of "
            f"{', '.join(WEIGHT_FILES)}"
        )
    return listed, listed / WEIGHT_FILES[2]


def find_merges(named: str, folder: Path) -> Path:
    """Return CLIP's file of merges: the named one, else next to the weights, else in open_clip."""
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise CallerError(f"[tokenizer] merges = {named!r}: the file does not exist")
        return path
    package = importlib.util.find_spec("open_clip")
    for position in (
        folder,
        *map(Path, (package.submodule_search_locations or ()) if package else ()),
    ):
        for name in MERGE_FILES:
            if (position / name).is_file():
                return position / name
    raise CallerError(
        f"CLIP's merges are neither next to the weights in {folder} nor in an installed open_clip: "
        f"set [tokenizer] merges to a {' or '.join(MERGE_FILES)} file"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict with open_clip's names, float32, from safetensors or a torch file.

    A trainer's checkpoint is accepted too. Raises DataError.
    """
    try:
        loaded: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        torch.serialization.pickle.UnpicklingError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"{path} cannot be read as weights ({reason}): use safetensors or a plain state dict"
        ) from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if (
        not isinstance(loaded, dict)
        or not loaded
        or not all(isinstance(value, Tensor) for value in loaded.values())
    ):
        raise DataError(f"{path} has no state dict: use safetensors or a plain state dict")
    # DistributedDataParallel and torch.compile put their own names before the model's.
    state = {
        name.replace("_orig_mod.", "").removeprefix("module."): value
        for name, value in loaded.items()
    }
    nested = {
        name.removeprefix("text."): value
        for name, value in state.items()
        if name != "text.transformer.attn_mask"
    }
    return {
        name: value.float()
        for name, value in nested.items()
        if name not in ("attn_mask", "input_resolution", "context_length", "vocab_size")
    }


def load(model: CLIP, state: Mapping[str, Tensor], path: Path) -> None:
    """Load open_clip's state dict into our model.

    Raises DataError with a tensor that is missing, unknown or of another shape.
    """
    names = _names(model)
    unclip_state = model.state_dict()
    left = set(state) - set(names.values())
    if left:
        raise DataError(
            f"{path} has {min(left)}, which is not part of a plain CLIP ViT: only plain CLIP "
            "ViTs can be read"
        )
    converted = {}
    for name, theirs in names.items():
        if theirs not in state:
            raise DataError(f"{path} has no {theirs}: it is not a complete CLIP ViT")
        value = state[theirs].T if name in TRANSPOSED else state[theirs]
        value = _to_our_rows(value) if name == "text.tokens.weight" else value
        if value.shape != unclip_state[name].shape:
            raise DataError(
                f"{path}: {theirs} has shape {tuple(state[theirs].shape)}, which does not fit its "
                f"{CONFIG} or the other tensors"
            )
        converted[name] = value.contiguous()
    model.load_state_dict(converted)


def write(clip: Path, out: Path) -> list[Path]:
    """Write the CLIP of a `clip` folder for open_clip: config, weights, and tokenizer; return the
    files.

    `open_clip.create_model_and_transforms("local-dir:OUT")` loads the model, and
    `open_clip.get_tokenizer` with the same name loads its tokenizer; for a vocabulary that is not
    CLIP's, the config makes it use transformers with the files in the folder.
    `tokenizers.Tokenizer.from_file` works too and pads to the context. Raises CallerError for the
    convolutional tower, which open_clip does not have.
    """
    model, tokenizer = clip_model.load(clip)
    if model.config.image_tower != "vit":
        raise CallerError(
            "open_clip does not have this run's convolutional tower: train with --set "
            "clip.image_tower=vit to export it"
        )
    out.mkdir(parents=True, exist_ok=True)
    unclip_state = model.state_dict()
    state = {}
    for name, theirs in _names(model).items():
        value = (
            _to_their_rows(unclip_state[name])
            if name == "text.tokens.weight"
            else unclip_state[name]
        )
        state[theirs] = (value.T if name in TRANSPOSED else value).contiguous()
    save_file(state, out / WEIGHTS)
    facts, files = to_config(model), [CONFIG, WEIGHTS, "tokenizer.json"]
    (out / "tokenizer.json").write_text(json.dumps(_to_their_tokens(tokenizer), ensure_ascii=False))
    if not tokenizer.is_clips:  # get_tokenizer would take CLIP's own, whose ids run over the table
        facts["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = files[
            -1
        ]  # any name: it reads the folder itself
        files.append("tokenizer_config.json")
        (out / files[-1]).write_text(json.dumps(_to_their_tokenizer_config(tokenizer), indent=1))
    (out / CONFIG).write_text(json.dumps(facts, indent=1))
    return [out / name for name in files]


def to_their_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """Map our token ids to CLIP's, for our vocabulary of `vocab_size`; padding becomes 0."""
    theirs = ids - len(SPECIAL)
    return torch.where(
        ids == END, vocab_size - 2, torch.where(ids == START, vocab_size - 3, theirs)
    ).clamp(min=0)


def _names(model: CLIP) -> dict[str, str]:
    """Return open_clip's name of each tensor of a ViT model, by our name."""
    names = {
        ours: theirs
        for ours, theirs in OUTSIDE.items()
        if ours != "logit_bias" or model.config.loss == "sigmoid"
    }
    for tower, prefix, depth in (
        ("image", "visual.", model.config.depth),
        ("text", "", model.config.text_depth),
    ):
        for block in range(depth):
            names |= {
                f"{tower}.blocks.{block}.{ours}": f"{prefix}transformer.resblocks.{block}.{theirs}"
                for ours, theirs in BLOCK.items()
            }
    return names


def _to_our_rows(rows: Tensor) -> Tensor:
    """Map rows (V, D) in CLIP's order to (V + 1, D) in ours: padding (zeros), start, end, all
    others.
    """
    return torch.cat([torch.zeros_like(rows[:1]), rows[-2:], rows[:-2]])


def _to_their_rows(rows: Tensor) -> Tensor:
    """Map rows (V + 1, D) in our order to (V, D) in CLIP's, which has no row for padding."""
    return torch.cat([rows[len(SPECIAL) :], rows[START : END + 1]])


def _from_config(
    config: ClipConfig, declared: Mapping[str, Any], path: Path
) -> tuple[ClipConfig, int, int]:
    """Return the section, context and vocabulary size that an `open_clip_config.json` describes."""
    try:
        model, pixels = declared["model_cfg"], declared.get("preprocess_cfg", {})
        vision, text = model["vision_cfg"], model["text_cfg"]
        for name, part, supported in (("vision_cfg", vision, VISION), ("text_cfg", text, TEXT)):
            for key, value in part.items():
                if value is not None and (
                    key not in supported or supported[key] not in (None, value)
                ):
                    raise CallerError(
                        f"{path}: {name}.{key} = {value!r} is not supported: only plain CLIP ViTs "
                        "can be read"
                    )
        for key in model.keys() - MODEL:
            raise CallerError(
                f"{path}: model_cfg.{key} is not supported: only plain CLIP ViTs can be read"
            )
        for key, values in PIXELS.items():
            if pixels.get(key) not in values:
                raise CallerError(
                    f"{path}: preprocess_cfg.{key} = {pixels[key]!r} is not supported: choose "
                    "another model"
                )
        fields = {
            "image_size_px": vision["image_size"], "patch_px": vision.get("patch_size", 16),
            "width": vision["width"], "depth": vision["layers"],
            "image_heads": vision["width"] // (vision.get("head_width") or HEAD_WIDTH),
            "image_mlp_ratio": vision.get("mlp_ratio", 4.0),
            "text_width": text["width"], "text_depth": text["layers"], "text_heads": text["heads"],
            "embed_dim": model["embed_dim"],
            "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
            "pixel_mean": pixels.get("mean", PIXEL_MEAN), "pixel_std": pixels.get("std", PIXEL_STD),
            "resize_mode": pixels.get("resize_mode") or "shortest",
            "fill_color": pixels.get("fill_color", 0),
            "interpolation": "bilinear" if pixels.get("interpolation") == "bilinear" else "bicubic",
            "loss": "sigmoid" if model.get("init_logit_bias") is not None else "softmax",
        }  # fmt: skip
        return (
            _resolved(config, fields),
            text.get("context_length", 77),
            text.get("vocab_size", 49_408),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CallerError(
            f"{path} is not an open_clip config ({type(error).__name__}: {error})"
        ) from None


def _from_weights(
    config: ClipConfig, state: Mapping[str, Tensor], path: Path
) -> tuple[ClipConfig, int, int]:
    """Return section, context and vocabulary size from the shapes in a state dict.

    The weights do not say which GELU was used, so `activation` comes from the recipe.
    """
    try:
        D, _, patch_px, _ = state["visual.conv1.weight"].shape
        text_width, embed_dim = state["text_projection"].shape
        side = math.isqrt(len(state["visual.positional_embedding"]) - 1)
        fields = {
            "image_size_px": side * patch_px, "patch_px": patch_px, "width": D,
            "depth": _depth(state, "visual."),
            "image_heads": D // HEAD_WIDTHS.get(D, HEAD_WIDTH),
            "image_mlp_ratio": len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]) / D,
            "text_width": text_width, "text_depth": _depth(state, ""),
            "text_heads": text_width // HEAD_WIDTH, "embed_dim": embed_dim,
            "pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD, "resize_mode": "shortest",
            "interpolation": "bicubic",
            "loss": "sigmoid" if "logit_bias" in state else "softmax",
        }  # fmt: skip
        return (
            _resolved(config, fields),
            len(state["positional_embedding"]),
            len(state["token_embedding.weight"]),
        )
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{path} is not the state dict of a CLIP ViT ({error}): only CLIP ViTs can be read"
        ) from None


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return sum(
        name.startswith(f"{prefix}transformer.resblocks.") and name.endswith(".ln_1.weight")
        for name in state
    )


def _resolved(config: ClipConfig, fields: Mapping[str, Any]) -> ClipConfig:
    return ClipConfig.model_validate(config.model_dump() | {"image_tower": "vit"} | dict(fields))


def to_config(model: CLIP) -> dict[str, Any]:
    """Return the contents of `open_clip_config.json` for a ViT model."""
    config = model.config
    heads = config.image_heads or heads_of(config.width)
    vision: dict[str, float] = {
        "image_size": config.image_size_px,
        "patch_size": config.patch_px,
        "head_width": config.width // heads,
    }
    vision |= {"layers": config.depth, "width": config.width, "mlp_ratio": config.image_mlp_ratio}
    text = {
        "context_length": model.context,
        "vocab_size": model.vocab_size - 1,
        "width": config.text_width,
    }
    text["heads"] = config.text_heads or heads_of(config.text_width)
    tokenizer_config: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "vision_cfg": vision,
        "text_cfg": text | {"layers": config.text_depth},
    }
    if config.activation == "quick_gelu":
        tokenizer_config["quick_gelu"] = True
    if config.loss == "sigmoid":
        tokenizer_config |= {
            "init_logit_scale": model.logit_scale.item(),
            "init_logit_bias": model.logit_bias.item(),
        }
    pixels = {
        "size": config.image_size_px,
        "mode": "RGB",
        "mean": config.pixel_mean,
        "std": config.pixel_std,
    }
    pixels |= {"resize_mode": config.resize_mode, "fill_color": config.fill_color}
    pixels["interpolation"] = (
        "bilinear" if config.interpolation == "bilinear" else "bicubic"
    )  # it has nothing nearer to `area`
    return {"model_cfg": tokenizer_config, "preprocess_cfg": pixels}


def _to_their_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return our `tokenizer.json` with CLIP's ids, padded with 0 to the context."""
    engine_json: dict[str, Any] = json.loads(tokenizer.engine.to_str())
    vocab_size = tokenizer.vocab_size
    ids = torch.arange(vocab_size)
    theirs = to_their_ids(ids, vocab_size).tolist()
    vocab = {
        word: theirs[number]
        for word, number in engine_json["model"]["vocab"].items()
        if word != SPECIAL[0]
    }
    engine_json["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    engine_json["added_tokens"] = [
        token | {"id": theirs[token["id"]]}
        for token in engine_json["added_tokens"]
        if token["content"] != SPECIAL[0]
    ]
    for name in SPECIAL[1:]:
        engine_json["post_processor"]["special_tokens"][name]["ids"] = [vocab[name]]
    engine_json["padding"] = {
        "strategy": {"Fixed": tokenizer.context}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0,
        "pad_token": next(word for word, number in vocab.items() if number == 0),
    }  # fmt: skip
    return engine_json


def _to_their_tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `tokenizer_config.json` that makes transformers read our `tokenizer.json`.

    Padding is the end token: the text is read at the first one, and 0 is a word of its own.
    """
    _, start, end = SPECIAL
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.context,
    }
    return tokenizer_config | {"bos_token": start, "eos_token": end, "pad_token": end}
