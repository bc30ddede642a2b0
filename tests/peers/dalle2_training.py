"""Trains DALLE2-pytorch's prior and decoder for a given time on pictures and embeddings from a file, and draws what is asked for.

    python dalle2_training.py TOLD.json: `data`, `prior`, `decoder`, `parameters`, `seconds`, `threads`, `batch`, `learning_rate`, `out`

A warm-up and a cosine to nothing over the steps that fit into the time, averaged weights as ours are averaged, so that the models and
their losses are compared and not the trainers' defaults, which are made for days. Knows nothing of ours.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dalle2_peer import Trained, count, import_dalle2, make_decoder, make_prior
from torch import Tensor, nn

CALIBRATION_STEPS = 4
DRAWN_AT_ONCE = 32


def nearest(make: Callable[[int], nn.Module], options: range, parameters: int) -> nn.Module:
    """Return the model whose number of parameters comes nearest."""
    sizes = {}
    for option in options:
        with torch.device("meta"):
            sizes[option] = count(make(option))
    return make(min(sizes, key=lambda option: abs(sizes[option] - parameters)))


def train(
    model: nn.Module, batch_of: Callable[[Tensor], dict[str, Tensor]], samples: int, told: dict[str, Any], name: str
) -> tuple[nn.Module, dict[str, Any]]:
    """Train for told["seconds"][name] and return the averaged model and what it took."""
    trained, averaged = Trained(model, told["learning_rate"][name], 0.01, 0.5), copy.deepcopy(model).eval()
    seconds, batch = told["seconds"][name], told["batch"][name]
    started_s, steps, number, order, loss = time.monotonic(), 0, 0, torch.empty(0, dtype=torch.long), 0.0
    while not steps or number < steps:
        passed_s = time.monotonic() - started_s
        if number == CALIBRATION_STEPS:
            steps = max(number + 1, int(seconds / (passed_s / number)))
        done = number / steps if steps else 0.0
        rate = min(done / 0.05, 0.5 * (1 + math.cos(math.pi * done)))
        for group in trained.optimizer.param_groups:
            group["lr"] = told["learning_rate"][name] * max(rate, 1e-3)
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(samples)])
        rows, order = order[:batch], order[batch:]
        loss = trained.step(told["bf16"], **batch_of(rows))
        with torch.no_grad():
            decay = min(0.999, (1 + number) / (10 + number))
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        number += 1
        if time.monotonic() - started_s > seconds:
            break
    facts = {"parameters": count(model), "images_seen": number * batch, "seconds": time.monotonic() - started_s, "loss": loss}
    return averaged, facts


@torch.no_grad()
def draw(prior: Any, decoder: Any, z_t: Tensor, encodings: Tensor, guidance: float) -> Tensor:
    """Draw a picture for each text, uint8 (B, 3, S, S): the better of two z_i by its cosine to z_t, as its prior's `sample` does."""
    told = {"text_embed": z_t, "text_encodings": encodings}
    both = torch.stack([prior.p_sample_loop(tuple(z_t.shape), text_cond=told, timesteps=64) for _ in range(2)])
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
    prior = nearest(lambda depth: make_prior(dalle2, told["prior"] | {"depth": depth}), range(1, 13), wanted["prior"])
    decoder = nearest(lambda dim: make_decoder(dalle2, told["decoder"] | {"dim": dim}), range(16, 129, 8), wanted["decoder"])

    def texts(rows: Tensor) -> dict[str, Tensor]:
        return {"text_embed": z_t[rows], "image_embed": z_i[rows], "text_encodings": encodings[rows].float()}

    def pictures(rows: Tensor) -> dict[str, Tensor]:
        image = images[rows].permute(0, 3, 1, 2).float() / 255
        return {"image": image, "image_embed": z_i[rows], "text_encodings": encodings[rows].float()}

    prior, of_prior = train(prior, texts, len(z_i), told, "prior")
    decoder, of_decoder = train(decoder, pictures, len(z_i), told, "decoder")
    parts = [slice(start, start + DRAWN_AT_ONCE) for start in range(0, len(data["asked_z_t"]), DRAWN_AT_ONCE)]
    made = [draw(prior, decoder, data["asked_z_t"][part], data["asked_encodings"][part].float(), told["guidance"]) for part in parts]
    torch.save({"images": torch.cat(made), "prior": of_prior, "decoder": of_decoder, "version": str(dalle2.__version__)}, told["out"])


if __name__ == "__main__":
    main()
