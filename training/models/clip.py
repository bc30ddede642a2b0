"""CLIP: an image tower and a text tower, their symmetric contrastive loss, loading, embedding.

There are two image towers: the paper's ViT, and a small residual convolutional net that learns far
more in minutes on a CPU at 32 px. Knows nothing of image files, Ray or the index.
Legend: B batch, N tokens, D width, E embedding dimensions, C channels.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.models.pixels import to_pixels
from training.models.tokenizer import END, PAD, Tokenizer
from training.models.transformer import Block, TextEncoder
from training.optim.collectives import gather
from training.sections.clip_section import ClipConfig

LOGIT_SCALE_START, LOGIT_SCALE_MAX = math.log(1 / 0.07), math.log(100)
"""Radford et al. 2021, section 2.5."""
SIGMOID_SCALE_START, SIGMOID_BIAS_START = math.log(10), -10.0  # Zhai et al. 2023, section 3.2
MARK = 0x5851F42D4C957F2D
"""An odd 63-bit number (Knuth's multiplier). Two different texts have equal polynomials in it about
once in 2^64."""


class ConvTower(nn.Module):
    """Residual 3x3 convolutions at 1/2, 1/4 and 1/8 of the side, then a mean over positions."""

    def __init__(self, width: int, depth: int, embed_dim: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.stem = nn.Conv2d(3, width, 4, stride=2, padding=1)
        stages: list[nn.Module] = []
        before = width
        for level, after in enumerate(widths):
            if level:
                stages.append(nn.Conv2d(before, after, 2, stride=2))
            stages += [ConvBlock(after) for _ in range(depth)]
            before = after
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(before)
        self.project = nn.Linear(before, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, E)."""
        x = self.stages(self.stem(x.contiguous(memory_format=torch.channels_last)))
        return self.project(self.norm(x.mean((2, 3))))  # (B, C, S/8, S/8) -> (B, C) -> (B, E)


class ConvBlock(nn.Module):
    """norm, conv, GELU, conv; the last starts at zero, so a deep tower starts as a shallow one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv_2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, S, S) to the same shape."""
        return x + self.conv_2(F.gelu(self.conv_1(self.norm(x))))


class VitTower(nn.Module):
    """CLIP's vision transformer: patches, a class token, pre-norm blocks, output at the class
    token.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width, side = config.width, config.image_size_px // config.patch_px
        self.patches = nn.Conv2d(3, width, config.patch_px, stride=config.patch_px, bias=False)
        self.class_token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positions = nn.Parameter(torch.randn(side**2 + 1, width) * width**-0.5)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        block = (
            width,
            False,
            config.image_heads,
            round(config.image_mlp_ratio * width),
            config.activation,
        )
        self.blocks = nn.Sequential(*(Block(*block) for _ in range(config.depth)))
        self.project = nn.Linear(width, config.embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, E)."""
        x = self.patches(x).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1) + self.positions
        x = self.blocks[:-1](self.norm_in(x))
        first = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.project(self.norm_out(self.blocks[-1].at(x, first)))  # type: ignore[operator]


class CLIP(nn.Module):
    """Embeds images and texts into one space; `encode_*` return unit vectors in float32."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: ClipConfig, vocab_size: int, context: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.context = config, vocab_size, context
        self.image: nn.Module
        if config.image_tower == "conv":
            self.image = ConvTower(config.width, config.depth, config.embed_dim).to(
                memory_format=torch.channels_last
            )  # type: ignore[call-overload]
        else:
            self.image = VitTower(config)
        self.text = TextEncoder(
            vocab_size,
            context,
            config.text_width,
            config.text_depth,
            config.text_heads,
            config.activation,
        )
        self.text_project = nn.Linear(config.text_width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(
            torch.tensor(LOGIT_SCALE_START if config.loss == "softmax" else SIGMOID_SCALE_START)
        )
        if config.loss == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor(SIGMOID_BIAS_START))
        self.register_buffer(
            "pixel_mean", torch.tensor(config.pixel_mean).view(3, 1, 1), persistent=False
        )
        self.register_buffer(
            "pixel_std", torch.tensor(config.pixel_std).view(3, 1, 1), persistent=False
        )

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed images, float (B, 3, S, S) in [-1, 1], as unit vectors (B, E)."""
        x = (pixels * 0.5 + (0.5 - self.pixel_mean)) / self.pixel_std
        return F.normalize(self.image(x).float(), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Embed texts, ids (B, N), as unit vectors (B, E), read at the end-of-text token."""
        ends = (ids == END).int().argmax(1)
        return F.normalize(self.text_project(self.text.at(ids, ends)).float(), dim=-1)

    def loss(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Return the contrastive loss of this worker's pairs against all workers' pairs.

        Takes pixels (b, 3, S, S) in [-1, 1] and ids (b, N).
        """
        image = self._in_chunks(self.encode_image, pixels)
        text = self._in_chunks(self.encode_text, ids)
        if self.config.loss == "sigmoid":
            return sigmoid_loss(image, text, marks(ids), self.logit_scale, self.logit_bias)
        return contrastive_loss(image, text, marks(ids), self.logit_scale)

    def _in_chunks(self, encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Encode in chunks, so that only one chunk's activations exist at a time.

        The backward pass encodes each chunk again.
        """
        if not self.config.chunk or len(x) <= self.config.chunk:
            return encode(x)
        return torch.cat(
            [checkpoint(encode, part, use_reentrant=False) for part in x.split(self.config.chunk)]
        )

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the temperature at or above 1 / 100 (Radford et al. 2021, section 2.5).

        Call it after every step.
        """
        self.logit_scale.clamp_(max=LOGIT_SCALE_MAX)


def contrastive_loss(image: Tensor, text: Tensor, captions: Tensor, logit_scale: Tensor) -> Tensor:
    """Return the symmetric cross entropy over cosine similarities (Radford et al. 2021, fig. 3).

    image and text are this worker's unit vectors (b, E). captions, int (b,), is equal for equal
    captions: such pairs match each other and share the target (Yang et al. 2022, UniCL, eq. 4-5).
    Each worker scores its own rows against all workers' columns, so memory is linear in the global
    batch; the mean over workers is the single-process loss with the same gradients.
    """
    is_right = captions[:, None] == gather(captions)  # (b, B)
    target = is_right / is_right.sum(1, keepdim=True)
    all_image, all_text = gather(image), gather(text)
    scale = logit_scale.exp()
    # bfloat16 would round a logit near 100 to a multiple of 0.5
    with torch.autocast(image.device.type, enabled=False):
        return (
            F.cross_entropy(scale * image @ all_text.T, target)
            + F.cross_entropy(scale * text @ all_image.T, target)
        ) / 2


def sigmoid_loss(
    image: Tensor, text: Tensor, captions: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """Return the sigmoid loss (Zhai et al. 2023, eq. 1): the mean over images of the sum over
    texts.

    Every image is scored with every text of all workers. image and text are this worker's unit
    vectors (b, E). captions, int (b,), is equal for equal captions: their images match all of them.
    The mean over workers is the single-process loss with the same gradients.
    """
    is_pair = torch.where(captions[:, None] == gather(captions), 1.0, -1.0)  # (b, B)
    all_text = gather(text)
    with torch.autocast(image.device.type, enabled=False):
        logits = logit_scale.exp() * image @ all_text.T + logit_bias
        return -F.logsigmoid(is_pair * logits).sum() / len(image)


def marks(ids: Tensor) -> Tensor:
    """Return a hash of every text, int64 (b,), from its ids (b, N), independent of the padding."""
    powers = torch.full((ids.shape[1],), MARK, device=ids.device).cumprod(0)  # modulo 2^64
    return (ids * powers).sum(1)


def count_parameters(config: ClipConfig, vocab_size: int, context: int = 77) -> int:
    """Count the parameters of both towers without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in CLIP(config, vocab_size, context).parameters())


def load(folder: Path) -> tuple[CLIP, Tokenizer]:
    """Read a trained CLIP (averaged weights) and its tokenizer from a `clip` stage's folder.

    The model is in evaluation mode, without gradients.
    """
    facts = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    model = CLIP(ClipConfig.model_validate(facts["clip"]), facts["vocab_size"], facts["context"])
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model.eval().requires_grad_(False), tokenizer


@torch.no_grad()
def embed_texts(model: CLIP, tokenizer: Tokenizer, texts: list[str], batch: int = 512) -> Tensor:
    """Embed texts as unit vectors, float32 (len(texts), E) on the CPU.

    Texts of similar length share a batch, which saves padding.
    """
    device = model.logit_scale.device
    ids = tokenizer(texts)
    lengths = (ids != PAD).sum(1)
    order = lengths.argsort()
    embeddings = torch.empty(len(texts), model.config.embed_dim)
    for start in range(0, len(texts), batch):
        rows = order[start : start + batch]
        embeddings[rows] = model.encode_text(ids[rows, : int(lengths[rows].max())].to(device)).cpu()
    return embeddings


@torch.no_grad()
def embed_images(model: CLIP, images: Tensor, batch: int = 512) -> Tensor:
    """Embed images, uint8 (B, H, W, 3), as unit vectors, float32 (B, E) on the CPU."""
    device, config = model.logit_scale.device, model.config
    batches = [torch.empty(0, config.embed_dim)]
    for part in images.split(batch):
        batches.append(
            model.encode_image(
                to_pixels(part.to(device), config.image_size_px, config.interpolation)
            ).cpu()
        )
    return torch.cat(batches)
