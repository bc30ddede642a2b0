"""The section [embed]."""

from typing import ClassVar

from pydantic import Field

from infra.settings import Section
from training.sections.loop_section import OnBroken


class EmbedConfig(Section):
    """How embeddings are made."""

    rows_per_part: int = Field(default=100_000, ge=1)
    """Rows in one file of embeddings."""
    batch_size: int = Field(default=256, ge=1)
    """Images or captions that CLIP encodes at once."""
    broken_pictures: OnBroken = "stop"
    """What to do about images whose shard is missing, truncated or altered: `stop` with an error,
    or `skip` them and count them in the manifest."""

    outside_key: ClassVar[frozenset[str]] = frozenset({"batch_size"})
