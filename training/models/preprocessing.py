"""How a picture becomes the square that a CLIP sees, in open_clip's words. Knows no pictures: an
exported model loads without them.
"""

from typing import Literal, NamedTuple

Resize = Literal["longest", "shortest", "squash"]
Interpolation = Literal["area", "bicubic", "bilinear"]


class Look(NamedTuple):
    """What is kept of a picture that is not square, and how pixels are made of pixels."""

    resize: Resize = "longest"
    """`longest`: all of it, with a border; `shortest`: the square in its middle; `squash`: all of
    it, out of proportion."""
    interpolation: Interpolation = "area"
    fill: int = 255
    """Of the border, 0 to 255."""


WHOLE = Look()
"""The whole picture on white, resized by area: what models see that are trained here."""
