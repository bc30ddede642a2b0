"""What the prior and the decoder read of an `embed` folder: z_i of a split, and all phrasings of every picture as token ids.

Legend: M phrasings in all, N tokens, E embedding dimensions.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor

from training.clip import CLIP, embed_texts
from training.pictures import read_table
from training.tokenizer import PAD, Tokenizer


def read(embed: Path, split: str) -> tuple[pa.Table, Tensor]:
    """Return the metadata of a split and its image embeddings, unit vectors float32 (rows, E), row by row."""
    table = read_table(embed / "metadata")
    z_i = np.concatenate([np.load(file) for file in sorted((embed / "img_emb").glob("*.npy"))]).astype(np.float32)
    chosen = pc.equal(table["split"], split)
    return table.filter(chosen), F.normalize(torch.from_numpy(z_i[chosen.to_numpy(zero_copy_only=False)]), dim=-1)


class Captions:
    """All phrasings of every picture, tokenised once."""

    def __init__(self, phrasings: list[list[str]], tokenizer: Tokenizer) -> None:
        self.texts = [text for each in phrasings for text in each]
        self.tokenizer = tokenizer
        self.ids = tokenizer(self.texts)  # (M, N)
        self.lengths = (self.ids != PAD).sum(1)
        self.counts = torch.tensor([len(each) for each in phrasings])
        self.firsts = self.counts.cumsum(0) - self.counts

    def draw(self, rows: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
        """Pick one phrasing for each picture by `chance` in [0, 1), (b,): its ids (b, N), N the longest drawn, and its number (b,)."""
        phrasing = self.firsts[rows] + (chance * self.counts[rows]).long()
        return self.ids[phrasing, : int(self.lengths[phrasing].max())], phrasing

    def embed(self, clip: CLIP) -> Tensor:
        """Return z_t of all phrasings, unit vectors float32 (M, E)."""
        return embed_texts(clip, self.tokenizer, self.texts)
