"""What the sections of a report have in common: whose pictures and captions are measured, by which
CLIP, and how figures are drawn.
"""

from dataclasses import dataclass
from pathlib import Path

from indexing.data.held_out import Embedded
from indexing.metrics.clip_score import EncodeImages
from indexing.metrics.zero_shot import EncodeTexts


@dataclass(frozen=True)
class Subject:
    """A run's embedded pairs and the CLIP that embedded them, as callables that return unit vectors
    (N, D).
    """

    embedded: Embedded
    shards: Path
    """Where the pairs' pictures are."""
    encode_texts: EncodeTexts
    encode_images: EncodeImages
    resamples: int
    """Bootstrap resamples behind each 95 % interval."""
    seed: int
    """Of what is sampled, drawn and resampled."""
    out: Path
    """The report's folder, in whose `pictures/` PNG files may be written."""
