"""open_clip in its own environment (`make peers`), asked over pipes: `{"do": ..., ...}` a line in,
a line of JSON out.

Builds random models and writes them as open_clip does, embeds with what it finds in a folder, turns
texts into ids. Knows nothing of ours.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


def import_open_clip() -> Any:
    """Import it although torchvision may be built for another torch: the two operators that it
    wants to describe are declared first.
    """
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import_open_clip.kept = library  # type: ignore[attr-defined]
    import open_clip

    return open_clip


def embed(model: Any, told: dict[str, Any], pixels: dict[str, Any]) -> None:
    """Embed `images` (a file of uint8 (B, S, S, 3)) and `ids` (B, N) and save unit vectors."""
    mean, std = (torch.tensor(pixels[name]) for name in ("mean", "std"))
    images = (torch.load(told["images"]).float() / 255 - mean) / std
    with torch.no_grad():
        image = model.encode_image(images.permute(0, 3, 1, 2), normalize=True)
        text = model.encode_text(torch.tensor(told["ids"]), normalize=True)
    torch.save(
        {"image": image, "text": text, "logit_scale": model.logit_scale.detach()}, told["out"]
    )


def answer(open_clip: Any, told: dict[str, Any]) -> Any:
    """Do what one line asks."""
    if told["do"] == "make":
        torch.manual_seed(told["seed"])
        model = open_clip.CLIP(**told["config"]).eval()
        with torch.no_grad():
            for p in model.parameters():
                p += 0.02 * torch.randn_like(p)  # gains and biases that are not one and zero
        folder = Path(told["folder"])
        pixels = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
        from safetensors.torch import save_file

        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": told["config"], "preprocess_cfg": pixels})
        )
        embed(model, told, pixels)
        return True
    if told["do"] == "embed":
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{told['folder']}")
        embed(
            model.eval(),
            told,
            json.loads((Path(told["folder"]) / "open_clip_config.json").read_text())[
                "preprocess_cfg"
            ],
        )
        return True
    if told["do"] == "ids":
        return open_clip.SimpleTokenizer(context_length=77)(told["texts"]).tolist()
    if told["do"] == "tokens":
        return open_clip.get_tokenizer(f"local-dir:{told['folder']}")(told["texts"]).tolist()
    if told["do"] == "show":
        from PIL import Image

        _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{told['folder']}")
        torch.save(transform(Image.open(told["picture"])), told["out"])
        return True
    if told["do"] == "published":
        return [
            open_clip.get_pretrained_cfg(*name.split("/"))["hf_hub"].rstrip("/")
            for name in told["names"]
        ]
    raise ValueError(told["do"])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    open_clip = import_open_clip()
    answers.write(
        json.dumps(
            {"version": open_clip.__version__, "package": str(Path(open_clip.__file__).parent)}
        )
        + "\n"
    )
    for line in sys.stdin:
        answers.write(json.dumps(answer(open_clip, json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
