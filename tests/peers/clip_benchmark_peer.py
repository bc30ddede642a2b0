"""CLIP_benchmark and open_clip's own zero-shot loop in their environment (`make peers`), asked over
pipes as `open_clip_peer` is.

The first line tells of the model's folder, the sets and the threads; each line after it names a
method and its arguments. Knows nothing
of ours.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from open_clip_peer import import_open_clip


class Peer:
    """A model loaded as CLIP_benchmark loads it, and sets in its WebDataset layout."""

    def __init__(self, open_clip: Any, told: dict[str, Any]) -> None:
        from clip_benchmark.datasets.builder import build_dataset, get_dataset_collate_fn
        from clip_benchmark.models.open_clip import load_open_clip

        self.open_clip, self.told = open_clip, told
        self.build, self.collate_of = build_dataset, get_dataset_collate_fn
        self.model, self.transform, _ = load_open_clip(f"local-dir:{told['model']}", None)
        self.model.eval()
        self.tokenizer = open_clip.SimpleTokenizer(context_length=77)

    def pictures(self, name: str) -> Any:
        """Return a set and its loader as CLIP_benchmark's command line makes them."""
        dataset = self.build(
            f"wds/{name}",
            root=str(Path(self.told["sets"]) / name),
            transform=self.transform,
            split="test",
        )
        loader = torch.utils.data.DataLoader(
            dataset.batched(self.told["batch"]),
            batch_size=None,
            shuffle=False,
            num_workers=self.told["workers"],
        )
        return dataset, loader

    def evaluate(self, name: str, amp: bool) -> dict[str, Any]:
        """Return CLIP_benchmark's figures of a set and its seconds, from files to figures, and the
        class of every picture.
        """
        from clip_benchmark.metrics import zeroshot_classification as theirs

        started_s = time.perf_counter()
        dataset, loader = self.pictures(name)
        found = theirs.evaluate(
            self.model, loader, self.tokenizer, dataset.classes, dataset.templates, "cpu", amp=amp
        )
        return {"figures": found, "seconds": time.perf_counter() - started_s}

    def said(self, name: str) -> list[int]:
        """Return the class that CLIP_benchmark gives every picture of a set."""
        from clip_benchmark.metrics import zeroshot_classification as theirs

        dataset, loader = self.pictures(name)
        classifier = theirs.zero_shot_classifier(
            self.model, self.tokenizer, dataset.classes, dataset.templates, "cpu", amp=False
        )
        return list(
            theirs.run_classification(self.model, classifier, loader, "cpu", amp=False)[0]
            .argmax(1)
            .tolist()
        )

    def loop(self, name: str, precision: str) -> dict[str, Any]:
        """Return the seconds of open_clip's own loop (open_clip_train.zero_shot.run) over a set,
        from files to top-1 and top-5.
        """
        from open_clip_train.zero_shot import run

        dataset, loader = self.pictures(name)
        templates = [lambda c, text=text: text.format(c=c) for text in dataset.templates]
        classifier = self.open_clip.build_zero_shot_classifier(
            self.model, self.tokenizer, dataset.classes, templates, 10, "cpu"
        )
        given = SimpleNamespace(device="cpu", precision=precision, batch_size=self.told["batch"])
        started_s = time.perf_counter()
        top_1, top_5 = run(self.model, classifier, loader, given)
        return {"seconds": time.perf_counter() - started_s, "top_1": top_1, "top_5": top_5}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    told = json.loads(sys.stdin.readline())
    torch.set_num_threads(told["threads"])
    peer = Peer(import_open_clip(), told)
    answers.write(
        json.dumps({name: version(name) for name in ("clip_benchmark", "open_clip_torch", "torch")})
        + "\n"
    )
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        answers.write(json.dumps(getattr(peer, name)(*arguments)) + "\n")


if __name__ == "__main__":
    main()
