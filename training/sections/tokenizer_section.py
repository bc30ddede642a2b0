"""The section [tokenizer]."""

from pydantic import Field

from infra.settings import Section


class TokenizerConfig(Section):
    """How captions become tokens."""

    vocab_size: int = Field(default=2048, ge=259, le=1 << 20)
    """Number of ids, with the 256 bytes and 3 special ones; CLIP's own vocabulary has 49,408."""
    context: int = Field(default=24, ge=4, le=1024)
    """Maximum tokens of a text, including start and end; longer texts are cut and still end with
    the end token. CLIP: 77."""
    merges: str = ""
    """CLIP's file of merges (`bpe_simple_vocab_16e6.txt.gz` or `merges.txt`), for a pretrained CLIP
    without one."""
