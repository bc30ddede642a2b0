"""The JSON bodies that clients send, as pydantic models with bounds.

`Question` is our own; `KnnQuestion` and `MetadataQuestion` are clip-retrieval's. Their other fields
are ignored, so that its clients work unchanged.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from indexing.service.image_upload import MAX_BYTES

MAX_TEXT = 2000
MAX_DIM = 8192
IMAGE_CHARS = MAX_BYTES * 4 // 3 * 78 // 76 + 64
"""Maximum characters of a picture in base64, with a line break after every 76."""


def without_surrogates(text: str) -> str:
    """Return a text without lone surrogates, which JSON allows and UTF-8 does not."""
    return text.encode("utf-8", "replace").decode()


Text = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(without_surrogates)]
Choice = Annotated[
    tuple[Annotated[str, Field(max_length=200), AfterValidator(without_surrogates)], ...],
    Field(max_length=100),
]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
Embedding = Annotated[list[Number], Field(max_length=MAX_DIM)]


class Question(BaseModel):
    """POST /search: exactly one of text, image, image_url, embedding and key."""

    model_config = ConfigDict(extra="forbid")

    text: Text | None = None
    image: Annotated[str, Field(max_length=IMAGE_CHARS)] | None = None
    """A PNG, JPEG or WebP file in base64."""
    image_url: Annotated[str, Field(max_length=4000), AfterValidator(without_surrogates)] | None = (
        None
    )
    embedding: Embedding | None = None
    key: Text | None = None
    """Find samples similar to the one with this key."""
    clip: Text | None = None
    """Fingerprint of the CLIP that made `embedding`; refused if another one made the index."""
    modality: Literal["image", "text"] = "image"
    """Whether to search the pictures or their captions."""
    k: int = Field(default=24, ge=1)
    offset: int = Field(default=0, ge=0)
    near_copies: bool = True
    """Whether to return results that are nearly the same picture as a better one."""
    licence: Choice = ()
    style: Choice = ()
    category: Choice = ()
    subcategory: Choice = ()
    split: Choice = ()
    min_side_px: int = Field(default=0, ge=0, le=1 << 20)
    max_side_px: int | None = Field(default=None, ge=0, le=1 << 20)


def _lenient_number(value: object) -> object:
    return 0 if value is None else value


class KnnQuestion(BaseModel):
    """POST /knn-service, as clip-retrieval's clients send it."""

    model_config = ConfigDict(extra="ignore")

    text: Text | None = None
    image: Annotated[str, Field(max_length=IMAGE_CHARS)] | None = None
    image_url: Annotated[str, Field(max_length=4000), AfterValidator(without_surrogates)] | None = (
        None
    )
    embedding_input: Embedding | None = None
    clip: Text | None = None
    """Fingerprint of the CLIP that made `embedding_input`; clip-retrieval's clients do not send
    it."""
    modality: Literal["image", "text"] = "image"
    num_images: Annotated[int, BeforeValidator(_lenient_number)] = Field(default=100, ge=0)
    num_result_ids: Annotated[int, BeforeValidator(_lenient_number)] = Field(default=0, ge=0)
    indice_name: Text | None = None
    deduplicate: bool = True


class MetadataQuestion(BaseModel):
    """POST /metadata, as clip-retrieval's front end sends it."""

    model_config = ConfigDict(extra="ignore")

    ids: list[Annotated[int, Field(ge=-(2**63), lt=2**63)]] = Field(max_length=10_000)
    indice_name: Text | None = None


class Token(BaseModel):
    """POST /session."""

    model_config = ConfigDict(extra="forbid")

    token: Annotated[str, Field(max_length=1000), AfterValidator(without_surrogates)]
