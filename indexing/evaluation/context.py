"""The input that all sections of a report share: a run's pairs, its CLIP, seed and folder."""

from dataclasses import dataclass
from pathlib import Path

from indexing.data.held_out import Embedded
from indexing.metrics.clip_score import EncodeImages
from indexing.metrics.zero_shot import EncodeTexts
from infra.storage.shard_reader import ShardReader


@dataclass(frozen=True)
class Subject:
    """A run's embedded pairs and the CLIP that embedded them, as callables for vectors (N, D)."""

    embedded: Embedded
    shards: ShardReader
    """Ingest's folder with the pictures of the pairs."""
    encode_texts: EncodeTexts
    encode_images: EncodeImages
    resamples: int
    """Number of bootstrap resamples for a 95 % interval."""
    seed: int
    """Seed of sampling, drawing and resampling."""
    out: Path
    """The report's folder; sections write PNG files into its `pictures/`."""
