"""Embeddings and captions for the prior and the decoder, read from an `embed` folder.

z_i of a split, and all captions ("phrasings") of every image as token ids. Vectors stay in their
files until they are indexed, captions stay in Arrow, and ids are not padded: a worker needs some
hundred bytes for each pair, whatever the embeddings' dimension.
Legend: M phrasings in all, N tokens, E embedding dimensions.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from training.data.image_reader import read_table
from training.models.clip import CLIP, embed_texts
from training.models.tokenizer import PAD, Tokenizer

FILES = ("metadata/*.parquet", "img_emb/*.npy")
"""The files of an embed folder that are read here."""
TOKENISED = 1 << 16
"""Texts tokenised at once."""
SAMPLED = 1 << 17
"""Maximum rows from which statistics of the embeddings are computed."""
HELD_BYTES = 4 << 30
"""Maximum size for which z_t of all phrasings is computed once and held in memory."""


class Vectors:
    """z_i of a table's rows, in memory-mapped float16 files.

    `vectors[rows]` returns float32 (len(rows), E), unit vectors on the CPU.
    """

    def __init__(self, files: Sequence[Path], rows: NDArray[np.int64]) -> None:
        self.parts = [np.load(file, mmap_mode="r") for file in files]
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dim(self) -> int:
        """Embedding dimension E."""
        return int(self.parts[0].shape[1])

    def __getitem__(self, rows_wanted: Tensor) -> Tensor:
        rows = self.rows[rows_wanted.numpy()]
        part_of = np.searchsorted(self.starts, rows, side="right") - 1
        vectors = np.empty((len(rows), self.dim), np.float32)
        for number in np.unique(part_of):
            inside = part_of == number
            vectors[inside] = self.parts[number][rows[inside] - self.starts[number]]
        return F.normalize(torch.from_numpy(vectors), dim=-1)

    def where(self, mask: NDArray[np.bool_]) -> "Vectors":
        """Return the vectors of the rows in a mask, bool (len(self),)."""
        chosen = Vectors((), self.rows[mask])
        chosen.parts, chosen.starts = self.parts, self.starts
        return chosen

    def sampled(self) -> Tensor:
        """Return the numbers of all rows, int64; if there are more than SAMPLED, that many evenly
        spaced.
        """
        return (
            torch.arange(len(self))
            if len(self) <= SAMPLED
            else torch.arange(SAMPLED) * len(self) // SAMPLED
        )


def read(embed: Path, split: str, columns: Sequence[str] | None = None) -> tuple[pa.Table, Vectors]:
    """Return a split's metadata (`columns`, or all) and its image embeddings, in the same row
    order.
    """
    metadata = embed / "metadata"
    in_split = pc.equal(read_table(metadata, columns=["split"])["split"], split).to_numpy(
        zero_copy_only=False
    )
    vectors = Vectors(sorted((embed / "img_emb").glob("*.npy")), np.flatnonzero(in_split))
    return read_table(metadata, split, columns), vectors


class Captions:
    """All phrasings of every image, tokenised once; the texts stay in Arrow.

    phrasings: a list of texts for each row.
    """

    def __init__(self, phrasings: pa.ChunkedArray | pa.Array, tokenizer: Tokenizer) -> None:
        self.texts = pc.list_flatten(phrasings)
        self.tokenizer = tokenizer
        tokens, lengths = [torch.empty(0, dtype=torch.int32)], [torch.empty(0, dtype=torch.int64)]
        for start in range(0, len(self.texts), TOKENISED):
            ids = tokenizer(self.texts.slice(start, TOKENISED).to_pylist())
            tokens.append(ids[ids != PAD].int())
            lengths.append((ids != PAD).sum(1))
        self.tokens = torch.cat(tokens)  # of all texts, concatenated
        self.lengths = torch.cat(lengths)  # (M,)
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.counts = torch.from_numpy(pc.list_value_length(phrasings).to_numpy().astype(np.int64))
        self.firsts = self.counts.cumsum(0) - self.counts

    def ids(self, phrasing: Tensor) -> Tensor:
        """Return the ids of phrasings (b,) by number, int64 (b, N), N the longest of them."""
        lengths = self.lengths[phrasing, None]
        column = torch.arange(int(lengths.max()))
        positions = (self.starts[phrasing, None] + column).clamp_(max=len(self.tokens) - 1)
        return self.tokens[positions].long().where(column < lengths, PAD)

    def draw(self, rows: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
        """Pick one phrasing for each row by `chance` in [0, 1), (b,).

        Returns its ids (b, N), N the longest of them, and its number (b,).
        """
        phrasing = self.firsts[rows] + (chance * self.counts[rows]).long()
        return self.ids(phrasing), phrasing

    def embedded(self, clip: CLIP) -> Callable[[Tensor], Tensor]:
        """Return a function from phrasing numbers (b,) to z_t, unit vectors float32 (b, E) on the
        CPU.

        If all z_t fit into HELD_BYTES they are computed now; otherwise the function computes them
        and holds the CLIP.
        """
        if len(self.texts) * clip.config.embed_dim * 4 <= HELD_BYTES:
            return embed_texts(clip, self.tokenizer, self.texts.to_pylist()).__getitem__
        device = clip.logit_scale.device

        @torch.no_grad()
        def embed(phrasing: Tensor) -> Tensor:
            return clip.encode_text(self.ids(phrasing).to(device)).cpu()

        return embed


def towards_first(chance: Tensor, share: float) -> Tensor:
    """Map uniform chances in [0, 1) so that `share` of them make `Captions.draw` pick the first
    phrasing.

    The others pick any phrasing.
    """
    return torch.where(chance < share, 0.0, (chance - share) / max(1 - share, 1e-9)).clamp_(
        max=1 - 2**-24
    )
