"""DALLE2-pytorch's side of the benchmark, a round at a time: training steps of its prior and its
decoder as its trainers make them.

Asked over pipes: a line of JSON in, seconds out. Text encodings come ready, as from its CLIP
adapters. Knows nothing of ours.
"""

import json
import os
import sys
import time
from typing import Any

import torch
from dalle2_peer import import_dalle2, make_decoder, make_prior
from timed_training import Trained, count


class Rounds:
    """What is measured, set up once."""

    def __init__(self, dalle2: Any, told: dict[str, Any]) -> None:
        torch.manual_seed(0)
        data = torch.load(told["data"])
        self.z_i, self.z_t, self.encodings, self.images = (
            data[name] for name in ("z_i", "z_t", "encodings", "images")
        )
        self.priors = {
            length: Trained(
                make_prior(dalle2, told["prior"] | {"text_len": length}), 1.1e-4, 6.02e-2, 0.5
            )
            for length in told["text_lengths"]
        }
        self.decoder = Trained(make_decoder(dalle2, told["decoder"]), 1e-4, 1e-2, 0.5)
        self.prior_batch, self.decoder_batch = told["prior_batch"], told["decoder_batch"]
        self.number = 0

    def parameters(self) -> dict[str, Any]:
        """Count them: of the prior without its table of null texts, whose size is the text
        length's.
        """
        priors = {str(length): count(each.model) for length, each in self.priors.items()}
        return {"priors": priors, "decoder": count(self.decoder.model)}

    def rows(self, batch: int) -> Any:
        """Return the next batch's rows."""
        self.number += 1
        return torch.arange(self.number * batch, (self.number + 1) * batch) % len(self.z_i)

    def prior(self, steps: int, length: int, bf16: bool) -> None:
        """Train the prior of that text length."""
        for _ in range(steps):
            rows = self.rows(self.prior_batch)
            batch = {
                "text_embed": self.z_t[rows],
                "image_embed": self.z_i[rows],
                "text_encodings": self.encodings[rows, :length],
            }
            self.priors[length].step(bf16, **batch)

    def draw(self, steps: int, bf16: bool) -> None:
        """Train the decoder."""
        for _ in range(steps):
            rows = self.rows(self.decoder_batch)
            self.decoder.step(
                bf16,
                image=self.images[rows % len(self.images)],
                image_embed=self.z_i[rows],
                text_encodings=self.encodings[rows],
            )


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    told = json.loads(sys.stdin.readline())
    torch.set_num_threads(told["threads"])
    dalle2 = import_dalle2()
    rounds = Rounds(dalle2, told)
    answers.write(
        json.dumps(
            {"version": str(dalle2.__version__), "torch": torch.__version__, **rounds.parameters()}
        )
        + "\n"
    )
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        started_s = time.perf_counter()
        getattr(rounds, name)(*arguments)
        answers.write(json.dumps(time.perf_counter() - started_s) + "\n")


if __name__ == "__main__":
    main()
