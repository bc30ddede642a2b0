"""open_clip's side of the benchmark, a round at a time: training steps as its trainer makes them,
zero-shot, tokenisation.

Asked over pipes as `open_clip_peer` is; answers are seconds. Knows nothing of ours.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from open_clip_peer import import_open_clip


class Rounds:
    """What is measured, set up once."""

    def __init__(self, open_clip: Any, told: dict[str, Any]) -> None:
        self.told, self.open_clip = told, open_clip
        data = torch.load(told["data"])
        self.images, self.ids = (
            data["images"],
            data["ids"],
        )  # float (M, B, 3, S, S) normalised, int (M, B, 77)
        self.loss = open_clip.ClipLoss()
        self.tokenizer = open_clip.SimpleTokenizer(context_length=77)
        self.unused = dict(self.tokenizer.cache)
        self.models = {context: self.prepared(context) for context in told["contexts"]}
        self.number = 0

    def prepared(self, context: int) -> tuple[Any, torch.optim.Optimizer]:
        """Return a model of that context, which open_clip fixes when it makes one, and its
        trainer's optimiser.
        """
        torch.manual_seed(0)
        config = self.told["config"]
        model = self.open_clip.CLIP(
            **config | {"text_cfg": config["text_cfg"] | {"context_length": context}}
        )
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
        return model, torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-6)

    def train(self, steps: int, context: int, bf16: bool) -> None:
        """Make steps of open_clip's train_one_epoch without its logging."""
        model, optimizer = self.models[context]
        model.train()
        for _ in range(steps):
            images, ids = (
                self.images[self.number % len(self.images)],
                self.ids[self.number % len(self.ids)][:, :context],
            )
            self.number += 1
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                image, text, scale = model(images, ids)
                loss = self.loss(image, text, scale)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, 4.6052)

    @torch.no_grad()
    def zero_shot(self, batches: int, bf16: bool) -> None:
        """Classify pictures as open_clip's zero_shot does: features, times the classifier's
        weights, the best.
        """
        model = self.models[77][0].eval()
        weights = torch.nn.functional.normalize(
            torch.randn(self.told["config"]["embed_dim"], 1000), dim=0
        )
        for place in range(batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                image = model.encode_image(self.images[place % len(self.images)], normalize=True)
                (100.0 * image @ weights).topk(5, 1)

    @torch.no_grad()
    def classifier(self, texts: list[str], context: int) -> None:
        """Embed the texts of a zero-shot classifier."""
        model = self.models[context][0].eval()
        for start in range(0, len(texts), 256):
            model.encode_text(
                self.tokenizer(texts[start : start + 256])[:, :context], normalize=True
            )

    def tokens(self, texts: list[str], is_cold: bool) -> None:
        """Turn texts into ids, without what it remembers of words if told so."""
        if is_cold:
            self.tokenizer.cache = dict(self.unused)
        self.tokenizer(texts)


def timed(work: Callable[..., None], *arguments: Any) -> float:
    started_s = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started_s


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    told = json.loads(sys.stdin.readline())
    torch.set_num_threads(told["threads"])
    open_clip = import_open_clip()
    rounds = Rounds(open_clip, told)
    answers.write(json.dumps({"version": open_clip.__version__, "torch": torch.__version__}) + "\n")
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        answers.write(json.dumps(timed(getattr(rounds, name), *arguments)) + "\n")


if __name__ == "__main__":
    main()
