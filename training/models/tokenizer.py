"""Captions to token ids: a lower-cased byte-level BPE, trained on the run's training captions by
Hugging Face `tokenizers`, or CLIP's own vocabulary for a pretrained CLIP.

Ids in both: 0 is padding, 1 starts and 2 ends a text (CLIP's own ids have the three special ones
elsewhere: `training.models.open_clip_format`). There is no unknown token, since every byte has an
id. Neither vocabulary merges across white space, so the ids of each word are cached. Reads and
writes `tokenizer.json`.
"""

import gzip
import html
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import ftfy
import numpy as np
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Engine
from torch import Tensor

from infra.errors import CallerError
from training.sections.tokenizer_section import TokenizerConfig

PAD, START, END = 0, 1, 2
SPECIAL = ("<|pad|>", "<|startoftext|>", "<|endoftext|>")
CLIP_MERGES = 49_152 - 256 - 2
"""Number of lines that CLIP uses of its file of merges."""
CLIP_WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
WORD_END = "</w>"
REMEMBERED_WORDS, LONG_WORD_CHARS = 1 << 18, 64


class Tokenizer:
    """Converts texts to padded id tensors; equal texts give equal rows in any process."""

    def __init__(self, engine: Engine, context: int) -> None:
        self.engine, self.context = engine, context
        engine.enable_truncation(context)  # start and end count too
        engine.encode_special_tokens = True  # "<|pad|>" in a caption is text, not a special token
        self.is_clips = engine.model.end_of_word_suffix == WORD_END
        self.words: dict[str, list[int]] = {}

    @classmethod
    def fit(cls, captions: Iterable[str], config: TokenizerConfig) -> "Tokenizer":
        """Learn merges from captions until `config.vocab_size` ids exist or no pair repeats."""
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
        engine.train_from_iterator(
            (" ".join(_unescaped(caption).split()) for caption in captions), trainer
        )
        engine.post_processor = _starts_and_ends()
        return cls(engine, config.context)

    @classmethod
    def from_merges(cls, path: Path, context: int = 77) -> "Tokenizer":
        """Build CLIP's own tokenizer from its file of merges, plain or gzipped.

        Raises CallerError if it is another file.
        """
        try:
            data = path.read_bytes()
            lines = (
                (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode().split("\n")
            )
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise CallerError(f"{path} cannot be read as CLIP's merges: {error}") from None
        merges = [
            (left, right)
            for left, _, right in (line.partition(" ") for line in lines[1 : CLIP_MERGES + 1])
        ]
        if (
            len(merges) < CLIP_MERGES
            or merges[0] != ("i", "n")
            or not all(right for _, right in merges)
        ):
            raise CallerError(
                f"{path} is not CLIP's file of {CLIP_MERGES:,} merges "
                "(bpe_simple_vocab_16e6.txt.gz)"
            )
        symbols = byte_symbols()
        words = [
            *SPECIAL,
            *symbols,
            *(symbol + WORD_END for symbol in symbols),
            *(left + right for left, right in merges),
        ]
        vocab = {word: number for number, word in enumerate(words)}
        if not all(left in vocab and right in vocab for left, right in merges):
            raise CallerError(f"{path} is not CLIP's file of merges: a merge has an unknown part")
        engine = Engine(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=WORD_END))
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(CLIP_WORDS, "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        engine.decoder = decoders.ByteLevel()
        engine.add_special_tokens(list(SPECIAL))
        engine.post_processor = _starts_and_ends()
        return cls(engine, context)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read `tokenizer.json`; the context is the truncation stored in it."""
        engine = Engine.from_file(str(path))
        assert engine.truncation is not None, f"{path} has no context length"
        return cls(engine, engine.truncation["max_length"])

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self.engine.save(str(path))

    @property
    def vocab_size(self) -> int:
        """Number of ids in use."""
        return self.engine.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return ids, int64 (B, N): N is the length of the longest text, at most the context.

        Shorter rows end in PAD.
        """
        parted = [self.clean(text).split() for text in texts]
        try:
            rows = self._rows(parted, self.words)
        except KeyError:  # a word that is not in the cache
            rows = self._rows(parted, self._ids_of(parted))
        lengths = np.array([len(row) for row in rows], np.int64)
        ids = np.full((len(rows), max(map(len, rows), default=2)), PAD)
        ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.fromiter(
            chain.from_iterable(rows), np.int64, int(lengths.sum())
        )
        return torch.from_numpy(ids)

    def _rows(self, parted: list[list[str]], token_ids: dict[str, list[int]]) -> list[list[int]]:
        """Join the ids of the words of each text. Raises KeyError for a word without ids."""
        ids_of, rows = token_ids.__getitem__, []
        for words in parted:
            row = [START, *chain.from_iterable(map(ids_of, words))]
            del row[self.context - 1 :]
            row.append(END)
            rows.append(row)
        return rows

    def _ids_of(self, parted: list[list[str]]) -> dict[str, list[int]]:
        """Return the ids of all words; only those that are not in the cache are encoded."""
        if len(self.words) > REMEMBERED_WORDS:
            self.words = {}
        cached = self.words
        new = list(dict.fromkeys(word for words in parted for word in words if word not in cached))
        encoded = {
            word: encoding.ids
            for word, encoding in zip(
                new, self.engine.encode_batch_fast(new, add_special_tokens=False), strict=True
            )
        }
        long = {word: ids for word, ids in encoded.items() if len(word) > LONG_WORD_CHARS}
        cached.update((word, ids) for word, ids in encoded.items() if word not in long)
        return cached | long if long else cached

    def clean(self, text: str) -> str:
        """Unescape HTML entities, as CLIP's own tokenizer does.

        For CLIP's own vocabulary also repair broken Unicode and lower-case the text.
        """
        if not self.is_clips:
            return _unescaped(text)
        if text.isascii() and text.isprintable() and "&" not in text:  # nothing to repair
            return text.lower()
        return _unescaped(ftfy.fix_text(text)).lower()


def _unescaped(text: str) -> str:
    return html.unescape(html.unescape(text))


def _starts_and_ends() -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{SPECIAL[START]} $A {SPECIAL[END]}",
        special_tokens=[(SPECIAL[START], START), (SPECIAL[END], END)],
    )


def byte_symbols() -> list[str]:
    """Return the characters that stand for the 256 bytes in byte-level BPE, in CLIP's order.

    Printable bytes come first and stand for themselves.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(others)]
