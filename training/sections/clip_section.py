"""The section [clip]: the two towers and their training."""

from typing import Literal, Self

from pydantic import Field, model_validator

from training.sections.loop_section import LoopConfig, OnBroken
from training.sections.preprocessing import WHOLE, Interpolation, Look, Resize

Activation = Literal["gelu", "quick_gelu"]
Channels = tuple[float, float, float]


class ClipConfig(LoopConfig):
    """The two towers and their training (Radford et al. 2021)."""

    pretrained: str = ""
    """Use a ViT that open_clip trained instead of training one: its folder or file,
    `hf-hub:ORGANISATION/NAME`, or open_clip's `MODEL/TAG` (`ViT-B-32/laion2b_s34b_b79k`). The
    shape of the towers is then read from there."""
    image_size_px: int = Field(default=32, ge=16, le=1024)
    """Side of the images that the image tower sees."""
    resize_mode: Resize = WHOLE.resize
    """How an image becomes a square: `longest` keeps all of it, `shortest` crops the central
    square, `squash` changes the proportions."""
    interpolation: Interpolation = WHOLE.interpolation
    """How images are resized; a pretrained CLIP has its own (mostly `bicubic` and `shortest`)."""
    fill_color: int = Field(default=WHOLE.fill, ge=0, le=255)
    """Grey value of the border that `longest` adds; 255 is white."""
    image_tower: Literal["conv", "vit"] = "conv"
    """`conv`: residual convolutions, for small images and budgets; `vit`: the vision transformer of
    CLIP."""
    width: int = Field(default=64, ge=16, le=8192)
    """Image tower: channels at half the image's side (conv; doubled twice further down), or the
    transformer's width (vit)."""
    depth: int = Field(default=2, ge=1, le=64)
    """Image tower: residual blocks at each of three resolutions (conv), or transformer blocks (vit;
    unCLIP: 32)."""
    patch_px: int = Field(default=8, ge=1, le=64)
    """Side of a patch (vit only; unCLIP: 16)."""
    text_width: int = Field(default=128, ge=16, le=8192)
    """Width of the text tower; unCLIP: 1024."""
    text_depth: int = Field(default=2, ge=1, le=64)
    """Blocks of the text tower; unCLIP: 24."""
    embed_dim: int = Field(default=128, ge=8, le=4096)
    """Dimensions of the shared embedding."""
    image_heads: int = Field(default=0, ge=0, le=256)
    """Attention heads of the vision transformer; 0: one for each 64 channels (32 in small ones)."""
    text_heads: int = Field(default=0, ge=0, le=256)
    """Attention heads of the text tower; 0: one for every 64 channels (32 in small ones)."""
    image_mlp_ratio: float = Field(default=4.0, gt=0, le=16)
    """Width of the vision transformer's MLPs divided by its own width."""
    activation: Activation = "gelu"
    """Activation in both transformers' MLPs; OpenAI's own models use `quick_gelu`."""
    pixel_mean: Channels = (0.5, 0.5, 0.5)
    """Mean that is subtracted from each channel (0 to 1) of an image."""
    pixel_std: Channels = (0.25, 0.25, 0.25)
    """Standard deviation that each channel is then divided by."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax`: CLIP's own loss; `sigmoid`: every pair is scored alone (SigLIP: Zhai et al. 2023,
    section 3)."""
    chunk: int = Field(default=0, ge=0)
    """Pairs whose activations a worker holds at once (Gao et al. 2021, GradCache); 0: the whole
    batch. The loss still covers the whole batch, at the cost of a second forward pass."""
    compile: bool = False
    """Compile the towers with torch.compile; takes minutes at the start and pays off on a GPU."""
    style_captions: bool = True
    """Train on all captions of an image, one drawn at random each time; otherwise only on the
    first."""
    first_caption: float = Field(default=0.0, ge=0, le=1)
    """With style_captions: share of the draws that use the first caption, which is closest to
    search queries; the others are uniform over all captions."""
    broken_pictures: OnBroken = "stop"
    """What to do about images whose shard is missing, truncated or altered: `stop` with an error,
    or `skip` them and count them in the manifest."""

    @property
    def look(self) -> Look:
        """How images are made square for the image tower."""
        return Look(self.resize_mode, self.interpolation, self.fill_color)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.compile and self.shard:
            raise ValueError(
                "compile = true and shard = true: choose one, since compiled towers do not gather "
                "their weights"
            )
        for name, width, heads in (
            ("", self.width, self.image_heads),
            ("text_", self.text_width, self.text_heads),
        ):
            if heads and width % heads:
                raise ValueError(
                    f"{name}width = {width} but {name or 'image_'}heads = {heads}: the width must "
                    "be a multiple of the heads"
                )
        return self
