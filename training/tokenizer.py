"""Captions to token ids: a lower-cased byte-level BPE, trained on the run's own training captions by Hugging Face `tokenizers`.

Ids: 0 pads, 1 starts, 2 ends a text. Nothing is unknown, since every byte has an id. Reads and writes `tokenizer.json`.
"""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from pydantic import Field
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from infra.settings import Section

PAD, START, END = 0, 1, 2
SPECIAL = ("<|pad|>", "<|startoftext|>", "<|endoftext|>")


class TokenizerConfig(Section):
    """How captions become tokens."""

    vocab_size: int = Field(default=2048, ge=259, le=1 << 20)
    """Ids in all, the 256 bytes and 3 special ones included; CLIP's own vocabulary has 49,408."""
    context: int = Field(default=24, ge=4, le=1024)
    """Most tokens of a text, start and end included; longer ones are cut and still end with the end token. CLIP: 77."""


class Tokenizer:
    """Turns texts into padded id tensors; equal texts give equal rows in any process."""

    def __init__(self, engine: Engine, context: int) -> None:
        self.engine, self.context = engine, context
        engine.enable_truncation(context)  # the template's start and end count
        engine.encode_special_tokens = True  # a caption that spells "<|pad|>" means the characters

    @classmethod
    def fit(cls, captions: Iterable[str], config: TokenizerConfig) -> "Tokenizer":
        """Learn merges from the captions until `config.vocab_size` ids exist (or no pair repeats)."""
        engine = Engine(models.BPE())
        engine.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        engine.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        engine.train_from_iterator((_clean(caption) for caption in captions), trainer)
        engine.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[START]} $A {SPECIAL[END]}", special_tokens=[(SPECIAL[START], START), (SPECIAL[END], END)]
        )
        return cls(engine, config.context)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read `tokenizer.json`; the context length is the truncation stored in it."""
        engine = Engine.from_file(str(path))
        assert engine.truncation is not None, f"{path} has no context length"
        return cls(engine, engine.truncation["max_length"])

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self.engine.save(str(path))

    @property
    def vocab_size(self) -> int:
        """Ids in use."""
        return self.engine.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return ids, int64 (B, N): N is the longest text of the batch, at most the context; shorter rows end in PAD."""
        rows = [encoding.ids for encoding in self.engine.encode_batch([_clean(text) for text in texts])]
        ids = torch.full((len(rows), max(map(len, rows), default=2)), PAD)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        return ids


def _clean(text: str) -> str:
    """Undo HTML entities and fold white space, as CLIP's own tokenizer does."""
    return " ".join(html.unescape(html.unescape(text)).split())
