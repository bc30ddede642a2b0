"""Trains open_clip for a given time on pictures and captions from a file, as its trainer does, and
embeds what is held out.

    python open_clip_training.py TOLD.json: `data` (images, phrasings, what is held out), `config`,
    `seconds`, `seed`, `threads`, `out`

AdamW without decay on gains and biases, warm-up and cosine to nothing over the steps that fit into
the time, clamped temperature, texts
padded to the model's context. Knows nothing of ours.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from open_clip_peer import import_open_clip

CALIBRATION_STEPS = 4


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(told["threads"])
    torch.manual_seed(told["seed"])
    open_clip = import_open_clip()
    data = torch.load(told["data"])
    context = told["config"]["text_cfg"]["context_length"]
    tokenizer = open_clip.SimpleTokenizer(context_length=context)
    ids = tokenizer(data["phrasings"])  # (M, N) all phrasings, those of picture i from firsts[i] on
    model = open_clip.CLIP(**told["config"])
    groups = [
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        {
            "params": [p for p in model.parameters() if p.ndim >= 2],
            "weight_decay": told["weight_decay"],
        },
    ]
    optimizer = torch.optim.AdamW(groups, lr=told["learning_rate"], betas=(0.9, 0.98), eps=1e-6)
    loss_of, images, batch = open_clip.ClipLoss(), data["images"], told["batch"]
    started_s, steps, number, order = time.monotonic(), 0, 0, torch.empty(0, dtype=torch.long)
    while not steps or number < steps:
        if number == CALIBRATION_STEPS:
            steps = int(told["seconds"] / ((time.monotonic() - started_s) / number))
        done = number / steps if steps else 0.0
        rate = min(done / 0.05, 0.5 * (1 + math.cos(math.pi * done))) if steps else 0.0
        for group in optimizer.param_groups:
            group["lr"] = told["learning_rate"] * max(rate, 1e-3)
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(images))])
        rows, order = order[:batch], order[batch:]
        chance = torch.rand(batch).where(torch.rand(batch) >= told["first_caption"], 0.0)
        phrasing = data["firsts"][rows] + (chance * data["counts"][rows]).long()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=told["bf16"]):
            image, text, scale = model(normalised(images[rows]), ids[phrasing])
            loss = loss_of(image, text, scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        number += 1
        if time.monotonic() - started_s > told["seconds"]:
            break
    model.eval()
    with torch.no_grad():
        held = torch.cat(
            [
                model.encode_image(normalised(part), normalize=True)
                for part in data["held_out"].split(256)
            ]
        )
        texts = torch.cat(
            [
                model.encode_text(part, normalize=True)
                for part in tokenizer(data["texts"]).split(256)
            ]
        )
    torch.save(
        {
            "image": held,
            "text": texts,
            "images_seen": number * batch,
            "seconds": time.monotonic() - started_s,
        },
        told["out"],
    )


def normalised(images: Any) -> Any:
    """Scale uint8 (B, S, S, 3) as ours does, to (B, 3, S, S)."""
    return ((images.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)


if __name__ == "__main__":
    main()
