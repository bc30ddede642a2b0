"""Our CLIP and open_clip's are one model: the same weights, pictures and texts give the same
vectors, in both directions.

The comparisons ask open_clip in an environment of its own (tests/helpers/peer_environment.py).
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Engine
from torch import Tensor

from infra.errors import CallerError, DataError
from tests.helpers.peer_environment import Peer, interpreter_of
from training.data.image_reader import read_file
from training.jobs import train
from training.models import clip as clip_model
from training.models import open_clip_format
from training.models.clip import CLIP
from training.models.tokenizer import Tokenizer, byte_symbols
from training.sections.clip_section import ClipConfig
from training.sections.tokenizer_section import TokenizerConfig

TEXTS = [
    "a photo of a cat",
    "",
    "ein Mädchen mit Hut!",
    "猫 と 犬",
    "a very " + "long " * 100 + "caption",
]
MODELS: dict[str, dict[str, Any]] = {
    "ViT-B-32": {
        "embed_dim": 512,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 768, "patch_size": 32},
    },
    "ViT-L-14": {
        "embed_dim": 768,
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 1024, "patch_size": 14},
    },
    "ViT-H-14": {
        "embed_dim": 1024,
        "vision_cfg": {
            "image_size": 224,
            "layers": 1,
            "width": 1280,
            "head_width": 80,
            "patch_size": 14,
        },
    },
}  # depth is reduced: every block is the same code
TEXT_WIDTHS = {"ViT-B-32": (512, 8), "ViT-L-14": (768, 12), "ViT-H-14": (1024, 16)}
AWKWARD = [
    *TEXTS,
    "  spaces\t and\nlines \r\n",
    "\U0001f44b\U0001f3fb\u200d\U0001f525 waving",
    "fish &amp;amp; chips &lt;3 &copy; &#128512;",
    "naïve café déjà vu",
    "e\u0301t\u00e9 against \u00e9t\u00e9",
    "x" * 10_000,
    "don't you'll we've I'm he'd it's O'Neil",
    "12,345.67 $ 3e-5",
    "schÃ¶n mojibake â€œquotedâ€\x9d",
    "“curly” ‘quotes’ — dashes…",
    "ﬁne ﬂight",
    "\uff26\uff35\uff2c\uff2c wide",
    "ΣΊΣΥΦΟΣ ΟΔΟΣ",
    "İstanbul ISPARTA ß ẞ",
    "日本語のテキスト、",
    "そして中文文本。",
    "한국어 텍스트",
    "नमस्ते दुनिया",
    "مرحبا بالعالم",
    "\0\x07\x1b[31mred\x1b[0m",
    "a\u00a0b\u2003c\u3000d",
    "\ufeffbom",
    "http://example.org/?a=b&amp;c=d#e",
    "snake_case-and-kebab",
    "!",
    "!!! ???",
    "A.B.C. U.S.A.",
    "ⅷ ½ ² ①",
    "👩‍👩‍👧‍👦🏳️‍🌈🇫🇷",
    "\ufffd replaced",
    "<b>bold</b> < >",
    "a" * 65 + " b",
    "<|endoftext|>",
]


class OpenClip(Peer):
    """open_clip's process, which tells its version and folder first."""

    def __init__(self, python: Path) -> None:
        super().__init__(python, "open_clip_peer.py")
        self.facts = self.answer()

    def do(self, name: str, **told: Any) -> Any:
        """Ask one thing and return the answer."""
        return self.ask({"do": name} | told)


@pytest.fixture(scope="module")
def peer() -> Iterator[OpenClip]:
    peer = OpenClip(interpreter_of("open_clip"))
    yield peer
    peer.stop()


@pytest.fixture(scope="module")
def merges(peer: OpenClip) -> str:
    return str(Path(peer.facts["package"]) / "bpe_simple_vocab_16e6.txt.gz")


def pictures(count: int, side_px: int) -> Tensor:
    return torch.randint(
        0,
        256,
        (count, side_px, side_px, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(1),
    )


def made(peer: OpenClip, name: str, folder: Path) -> dict[str, Tensor]:
    """Let open_clip make and write a random model of that shape; return what it embeds the pictures
    and TEXTS as.
    """
    width, heads = TEXT_WIDTHS[name]
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": heads, "layers": 2}
    torch.save(pictures(3, 224), folder / "pictures.pt")
    ids = peer.do("ids", texts=TEXTS)
    told = {"images": str(folder / "pictures.pt"), "ids": ids, "out": str(folder / "peer.pt")}
    peer.do("make", config=MODELS[name] | {"text_cfg": text}, folder=str(folder), seed=3, **told)
    found: dict[str, Tensor] = torch.load(folder / "peer.pt")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_open_clips_weights_give_open_clips_vectors(
    name: str, peer: OpenClip, merges: str, tmp_path: Path
) -> None:
    theirs = made(peer, name, tmp_path)
    model, tokenizer, _ = open_clip_format.read(
        ClipConfig(pretrained=str(tmp_path)), TokenizerConfig(merges=merges)
    )
    torch.testing.assert_close(
        clip_model.embed_images(model, pictures(3, 224)), theirs["image"], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        clip_model.embed_texts(model, tokenizer, TEXTS), theirs["text"], atol=1e-5, rtol=0
    )
    assert model.logit_scale.item() == theirs["logit_scale"].item()
    assert float((theirs["text"][0] - theirs["text"][2]).norm()) > 1e-3, (
        "vectors that are all alike prove nothing"
    )
    assert float((theirs["image"][0] - theirs["image"][2]).norm()) > 1e-3


@pytest.mark.slow
def test_clips_own_ids_on_awkward_captions(peer: OpenClip, merges: str) -> None:
    tokenizer = Tokenizer.from_merges(Path(merges))
    texts = [text for text in AWKWARD if "<|" not in text] + [
        f"{a} {b}" for a in AWKWARD for b in AWKWARD[::7]
    ]
    ids = open_clip_format.to_their_ids(tokenizer(texts), tokenizer.vocab_size)
    padded = torch.zeros(len(texts), 77, dtype=torch.long)
    padded[:, : ids.shape[1]] = ids
    for text, ours, theirs in zip(texts, padded.tolist(), peer.do("ids", texts=texts), strict=True):
        assert ours == theirs, text[:80]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of as many merges as CLIP's own has, which anybody may carry about."""
    symbols = byte_symbols()
    pairs = [("i", "n"), *((a, b) for a in symbols for b in symbols if (a, b) != ("i", "n"))]
    file = tmp_path_factory.mktemp("merges") / "merges.txt"
    file.write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in pairs[:48_894])]))
    return file


def small(**changes: Any) -> ClipConfig:
    return ClipConfig(
        image_tower="vit",
        image_size_px=16,
        patch_px=8,
        width=32,
        depth=2,
        text_width=32,
        text_depth=2,
        embed_dim=16,
        **changes,
    )


def written(folder: Path, config: ClipConfig) -> tuple[CLIP, Tokenizer]:
    """Write a `clip` folder with random weights and a vocabulary of its own."""
    folder.mkdir()
    tokenizer = Tokenizer.fit(
        ["a red heart", "a red apple", "a blue disc"] * 4,
        TokenizerConfig(vocab_size=280, context=12),
    )
    tokenizer.save(folder / "tokenizer.json")
    torch.manual_seed(2)
    model = CLIP(config, tokenizer.vocab_size, tokenizer.context).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    train.write_model("clip", model, model.state_dict(), config, folder)
    return model, tokenizer


def their_model(folder: Path, merges: Path, **changes: Any) -> CLIP:
    """Write a small model with CLIP's number of tokens in open_clip's form; return what must be
    read back.
    """
    shape = small(**changes)
    torch.manual_seed(4)
    model = CLIP(shape, 49_409, 77).eval()
    folder.mkdir()
    shutil.copy(merges, folder)
    with torch.no_grad():
        model.text.tokens.weight[0] = 0  # padding has no row there
    jobs_folder = folder.with_name("own")
    jobs_folder.mkdir()
    Tokenizer.from_merges(merges).save(jobs_folder / "tokenizer.json")
    train.write_model("clip", model, model.state_dict(), shape, jobs_folder)
    open_clip_format.write(jobs_folder, folder)
    (folder / "tokenizer.json").unlink()
    return model


def same(a: CLIP, b: CLIP) -> bool:
    return a.state_dict().keys() == b.state_dict().keys() and all(
        b.state_dict()[name].equal(value) for name, value in a.state_dict().items()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"activation": "quick_gelu", "loss": "sigmoid", "image_heads": 2, "image_mlp_ratio": 3.0}],
    ids=["plain", "other"],
)
def test_what_we_export_gives_the_same_vectors_there(
    changes: dict[str, Any], peer: OpenClip, tmp_path: Path
) -> None:
    model, tokenizer = written(tmp_path / "clip", small(**changes))
    out = tmp_path / "out"
    assert open_clip_format.write(tmp_path / "clip", out) == [
        out / name
        for name in (
            "open_clip_config.json",
            "open_clip_model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        )
    ]
    texts = ["a red heart", "", "Zebra!", "a red apple " * 20]
    ids = [
        encoding.ids
        for encoding in Engine.from_file(str(out / "tokenizer.json")).encode_batch(texts)
    ]
    assert {len(row) for row in ids} == {tokenizer.context}
    torch.save(pictures(3, 16), tmp_path / "pictures.pt")
    peer.do(
        "embed",
        folder=str(out),
        images=str(tmp_path / "pictures.pt"),
        ids=ids,
        out=str(tmp_path / "peer.pt"),
    )
    theirs = torch.load(tmp_path / "peer.pt")
    torch.testing.assert_close(
        clip_model.embed_images(model, pictures(3, 16)), theirs["image"], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        clip_model.embed_texts(model, tokenizer, texts), theirs["text"], atol=1e-5, rtol=0
    )
    assert model.logit_scale.item() == theirs["logit_scale"].item()


@pytest.mark.slow
def test_open_clip_finds_the_tokenizer_of_a_vocabulary_that_is_not_its_own(
    peer: OpenClip, tmp_path: Path
) -> None:
    model, tokenizer = written(tmp_path / "clip", small())
    files = open_clip_format.write(tmp_path / "clip", tmp_path / "out")
    assert tmp_path / "out" / "tokenizer_config.json" in files
    texts = ["a red heart", "", "Zebra!", "wow! !", "fish &amp; chips", "a red apple " * 20]
    ids = peer.do("tokens", folder=str(tmp_path / "out"), texts=texts)
    assert {len(row) for row in ids} == {tokenizer.context}
    ours = open_clip_format.to_their_ids(tokenizer(texts), tokenizer.vocab_size)
    for row, own in zip(ids, ours.tolist(), strict=True):
        length = own.index(tokenizer.vocab_size - 2) + 1
        assert row[:length] == own[:length] and set(row[length:]) <= {
            tokenizer.vocab_size - 2
        }  # the first end is where it is read
    torch.save(pictures(1, 16), tmp_path / "pictures.pt")
    peer.do(
        "embed",
        folder=str(tmp_path / "out"),
        images=str(tmp_path / "pictures.pt"),
        ids=ids,
        out=str(tmp_path / "peer.pt"),
    )
    theirs = torch.load(tmp_path / "peer.pt")["text"]
    torch.testing.assert_close(
        clip_model.embed_texts(model, tokenizer, texts), theirs, atol=1e-5, rtol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "told",
    [
        {},
        {"resize_mode": "squash", "interpolation": "bilinear"},
        {"resize_mode": "longest", "fill_color": 200},
    ],
    ids=["plain", "squashed", "bordered"],
)
def test_a_pretrained_clip_sees_a_picture_as_open_clip_shows_it(
    told: dict[str, Any], peer: OpenClip, stand_in: Path, tmp_path: Path
) -> None:
    their_model(tmp_path / "theirs", stand_in)
    config = json.loads((tmp_path / "theirs" / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {
        "size": 16,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        **told,
    }
    (tmp_path / "theirs" / "open_clip_config.json").write_text(json.dumps(config))
    look = open_clip_format.read(small(pretrained=str(tmp_path / "theirs")), TokenizerConfig())[
        0
    ].config.look
    for shape in ((40, 60), (61, 33), (9, 13)):
        rgb = torch.randint(
            0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
        ).numpy()
        Image.fromarray(rgb).save(tmp_path / "one.png")
        peer.do(
            "show",
            folder=str(tmp_path / "theirs"),
            picture=str(tmp_path / "one.png"),
            out=str(tmp_path / "shown.pt"),
        )
        shown = (torch.load(tmp_path / "shown.pt") * 0.25 + 0.5).permute(1, 2, 0) * 255
        ours = torch.from_numpy(read_file(tmp_path / "one.png", 16, look))
        torch.testing.assert_close(
            ours.float(), shown, atol=1.01, rtol=0, msg=lambda text, shape=shape: f"{shape}: {text}"
        )


@pytest.mark.slow
def test_the_names_that_we_know_are_open_clips(peer: OpenClip) -> None:
    assert peer.do("published", names=list(open_clip_format.PUBLISHED)) == list(
        open_clip_format.PUBLISHED.values()
    )


def test_a_convolutional_tower_cannot_be_exported(tmp_path: Path) -> None:
    written(
        tmp_path / "clip",
        ClipConfig(image_size_px=16, width=16, depth=1, text_width=32, text_depth=1, embed_dim=16),
    )
    with pytest.raises(CallerError, match=r"clip\.image_tower=vit"):
        open_clip_format.write(tmp_path / "clip", tmp_path / "out")


@pytest.mark.parametrize("form", ["folder", "file", "trainer", "compiled", "both", "hub", "ours"])
def test_a_pretrained_clip_is_read_from_wherever_it_is(
    form: str, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = their_model(tmp_path / "theirs", stand_in)
    pretrained, own = str(tmp_path / "theirs"), small(image_heads=1, text_heads=1)
    prefix = {"trainer": "module.", "compiled": "_orig_mod.", "both": "module._orig_mod."}.get(form)
    if form == "file" or prefix:
        state = load_file(tmp_path / "theirs" / "open_clip_model.safetensors")
        (tmp_path / "theirs" / "open_clip_model.safetensors").unlink()
        pretrained = str(tmp_path / "theirs" / "epoch_9.pt")
        torch.save(
            {
                "epoch": 9,
                "state_dict": {f"{prefix}{name}": value for name, value in state.items()},
            }
            if prefix
            else state,
            pretrained,
        )
    if form == "hub":
        snapshot = tmp_path / "hub" / "models--lab--model" / "snapshots" / "abc"
        snapshot.parent.mkdir(parents=True)
        (tmp_path / "theirs").rename(snapshot)
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text("abc")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        pretrained = "hf-hub:lab/model"
    if form == "ours":
        pretrained = str(tmp_path / "own")
    model, tokenizer, source = open_clip_format.read(
        own.model_copy(update={"pretrained": pretrained}), TokenizerConfig()
    )
    assert same(model, expected) and tokenizer.vocab_size == 49_409 and tokenizer.context == 77
    assert (
        source["pretrained"] == pretrained == model.config.pretrained
        and len(source["weights_sha256"]) == 64
    )
    assert clip_model.embed_images(model, pictures(2, 16)).equal(
        clip_model.embed_images(expected, pictures(2, 16))
    )


def test_a_shape_is_read_off_a_bare_state_dict(stand_in: Path, tmp_path: Path) -> None:
    expected = their_model(tmp_path / "theirs", stand_in, image_heads=0, text_heads=0)
    (tmp_path / "theirs" / "open_clip_config.json").unlink()
    state = load_file(tmp_path / "theirs" / "open_clip_model.safetensors")
    wide = {
        name: torch.zeros([4 * size if size in (32, 96, 128) else size for size in value.shape])
        for name, value in state.items()
    }
    save_file(wide, tmp_path / "theirs" / "open_clip_model.safetensors")
    found = open_clip_format.read(
        small(pretrained=str(tmp_path / "theirs"), activation="quick_gelu"), TokenizerConfig()
    )[0].config
    assert (
        found.image_size_px,
        found.patch_px,
        found.width,
        found.depth,
        found.image_heads,
        found.image_mlp_ratio,
    ) == (
        16,
        8,
        128,
        2,
        2,
        4.0,
    )
    assert (
        found.text_width,
        found.text_depth,
        found.text_heads,
        found.embed_dim,
        found.activation,
    ) == (128, 2, 2, 16, "quick_gelu")
    assert (
        found.pixel_mean == open_clip_format.PIXEL_MEAN
        and expected.config.pixel_mean != found.pixel_mean
    )
    assert found.look[:2] == ("shortest", "bicubic") != expected.config.look[:2]


def pickled(folder: Path) -> Path:
    torch.save(
        {"visual.proj": Path("anything")}, folder / "weights.pt"
    )  # loading it would call code of the file's choice
    return folder / "weights.pt"


def half(folder: Path) -> Path:
    (folder / "weights.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    return folder / "weights.safetensors"


def resnet(folder: Path) -> Path:
    save_file({"visual.layer1.0.conv1.weight": torch.zeros(1)}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.mark.parametrize(
    ("broken", "error", "said"),
    [
        (pickled, DataError, "cannot be read as weights"),
        (half, DataError, "cannot be read as weights"),
        (resnet, DataError, "not the state dict of a CLIP ViT"),
        (lambda folder: folder, CallerError, "the folder has none of"),
        (lambda folder: "ViT-Z-1/none", CallerError, "neither a file nor a folder"),
    ],
)
def test_what_is_no_clip_vit_is_one_line(
    broken: Any, error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said) as caught:
        open_clip_format.read(small(pretrained=str(broken(tmp_path))), TokenizerConfig())
    assert "\n" not in str(caught.value)


def test_merges_that_are_nowhere_are_asked_for(stand_in: Path, tmp_path: Path) -> None:
    their_model(tmp_path / "theirs", stand_in)
    (tmp_path / "theirs" / "merges.txt").unlink()
    with pytest.raises(CallerError, match=r"set \[tokenizer\] merges"):
        open_clip_format.read(small(pretrained=str(tmp_path / "theirs")), TokenizerConfig())
