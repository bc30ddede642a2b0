"""Trains DALLE2-pytorch's prior and decoder for a given time on pictures and embeddings from a
file, and draws what is asked for.

    python dalle2_training.py TOLD.json: `data`, `prior`, `decoder`, `parameters`, `seconds`,
    `threads`, `batch`, `learning_rate`, `out`

Knows nothing of ours.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from dalle2_peer import import_dalle2, make_decoder, make_prior
from timed_training import nearest, train
from torch import Tensor, nn

DRAWN_AT_ONCE = 32


@torch.no_grad()
def draw(prior: Any, decoder: Any, z_t: Tensor, encodings: Tensor, guidance: float) -> Tensor:
    """Draw a picture for each text, uint8 (B, 3, S, S): the better of two z_i by its cosine to z_t,
    as its prior's `sample` does.
    """
    told = {"text_embed": z_t, "text_encodings": encodings}
    both = torch.stack(
        [prior.p_sample_loop(tuple(z_t.shape), text_cond=told, timesteps=64) for _ in range(2)]
    )
    best = nn.functional.cosine_similarity(both, z_t[None], dim=-1).argmax(0)
    z_i = nn.functional.normalize(both[best, torch.arange(len(z_t))], dim=-1)
    made = decoder.sample(image_embed=z_i, text_encodings=encodings, cond_scale=guidance)
    return (made.clamp(0, 1) * 255).round().to(torch.uint8)


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(told["threads"])
    torch.manual_seed(0)
    dalle2 = import_dalle2()
    data = torch.load(told["data"])
    z_i, z_t, encodings, images = (data[name] for name in ("z_i", "z_t", "encodings", "images"))
    wanted = told["parameters"]
    prior = nearest(
        lambda depth: make_prior(dalle2, told["prior"] | {"depth": depth}),
        range(1, 13),
        wanted["prior"],
    )
    decoder = nearest(
        lambda dim: make_decoder(dalle2, told["decoder"] | {"dim": dim}),
        range(16, 129, 8),
        wanted["decoder"],
    )

    def texts(rows: Tensor) -> dict[str, Tensor]:
        return {
            "text_embed": z_t[rows],
            "image_embed": z_i[rows],
            "text_encodings": encodings[rows].float(),
        }

    def pictures(rows: Tensor) -> dict[str, Tensor]:
        image = images[rows].permute(0, 3, 1, 2).float() / 255
        return {"image": image, "image_embed": z_i[rows], "text_encodings": encodings[rows].float()}

    def how(name: str) -> dict[str, Any]:
        return {key: told[key][name] for key in ("seconds", "batch", "learning_rate")} | {
            "bf16": told["bf16"]
        }

    prior, of_prior = train(prior, texts, len(z_i), **how("prior"))
    decoder, of_decoder = train(decoder, pictures, len(z_i), **how("decoder"))
    parts = [
        slice(start, start + DRAWN_AT_ONCE)
        for start in range(0, len(data["asked_z_t"]), DRAWN_AT_ONCE)
    ]
    made = [
        draw(
            prior,
            decoder,
            data["asked_z_t"][part],
            data["asked_encodings"][part].float(),
            told["guidance"],
        )
        for part in parts
    ]
    torch.save(
        {
            "images": torch.cat(made),
            "prior": of_prior,
            "decoder": of_decoder,
            "version": str(dalle2.__version__),
        },
        told["out"],
    )


if __name__ == "__main__":
    main()
