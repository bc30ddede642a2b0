"""How an image becomes the square that a CLIP sees, in open_clip's terms.

Needs no image library, so exported models can load it.
"""

from typing import Literal, NamedTuple

Resize = Literal["longest", "shortest", "squash"]
Interpolation = Literal["area", "bicubic", "bilinear"]


class Look(NamedTuple):
    """How images that are not square are cropped, padded and resized."""

    resize: Resize = "longest"
    """`longest`: the whole image with a border; `shortest`: the central square; `squash`: the whole
    image with changed proportions."""
    interpolation: Interpolation = "area"
    fill: int = 255
    """Grey value of the border, 0 to 255."""


WHOLE = Look()
"""The whole image on white, resized by area: the input of models that are trained here."""
