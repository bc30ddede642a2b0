"""Cost of training a recipe's models, counted without allocating them.

Counts parameters, FLOPs and activations of one sample, and optimiser state. Each model runs once
forward and backward on the meta device at batch 1; multiplications and additions count as one FLOP
each, and every tensor that autograd keeps counts as an activation, at two bytes a number (bfloat16)
and without checkpointing. Attention counts as a fused kernel keeps it: its inputs and output, not
its N x N weights. Knows no hardware: the caller gives the throughput.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from training.diffusion.process import split
from training.models.autoregressive_prior import AutoregressivePrior
from training.models.clip import CLIP
from training.models.decoder import Decoder
from training.models.priors import make
from training.models.upsampler import Upsampler
from training.optim import fsdp
from training.sections.clip_section import ClipConfig
from training.sections.decoder_section import DecoderConfig
from training.sections.loop_section import LoopConfig
from training.sections.prior_section import PriorConfig
from training.sections.upsampler_section import UpsamplerConfig

STATE_BYTES = 4 * 5
"""Bytes for each parameter: weight, gradient, both moments of Adam and the average, all float32."""
HELD_BYTES = 4 * 2
"""Bytes for each parameter that a sharded step holds from start to end: gathered weight and
gradient."""
PASSING_BYTES = {"bf16": 2 * 2 + 2 + 4, "float32": 2 * 4 + 4 + 4}
"""Bytes for each parameter of the largest block: gathered for this block and the next, its
gradient, and the gradient in float32 while it is reduced."""
BF16_BYTES = 2
DAY_S = 86_400


@dataclass(frozen=True)
class Cost:
    """Cost of one model; `flops` and `activation_bytes` are one sample's, forward and backward."""

    parameters: int
    flops: float
    activation_bytes: int
    undivided: int = 0
    """Parameters that every worker of a sharded training holds whole."""
    held: int = 0
    """Parameters that it gathers for a whole step."""
    largest: int = 0
    """Parameters of the largest block, which is gathered while it runs."""


def clip_cost(config: ClipConfig, vocab_size: int, context: int) -> Cost:
    """Count CLIP for one image and one caption of full length."""
    with torch.device("meta"):
        model = CLIP(config, vocab_size, context)
        pixels = torch.zeros(1, 3, config.image_size_px, config.image_size_px)
        ids = torch.zeros(1, context, dtype=torch.long)
    return _count(model, lambda: model.encode_image(pixels).sum() + model.encode_text(ids).sum())


def prior_cost(config: PriorConfig, embed_dim: int, vocab_size: int, context: int) -> Cost:
    """Count a prior of either kind for a caption of full length."""
    with torch.device("meta"):
        model = make(config, embed_dim, vocab_size, context)
        z, ids = torch.zeros(1, embed_dim), torch.zeros(1, context, dtype=torch.long)
        t = torch.ones(1, dtype=torch.long)
        buckets = torch.zeros(1, config.pca_dims + 1, dtype=torch.long)
    if isinstance(model, AutoregressivePrior):
        return _count(model, lambda: model(buckets, z, ids).sum())
    return _count(model, lambda: model(z, t, z, ids).sum())


def decoder_cost(config: DecoderConfig, embed_dim: int, vocab_size: int, context: int) -> Cost:
    """Count the decoder with its caption encoder."""
    with torch.device("meta"):
        model = Decoder(config, embed_dim, vocab_size, context)
        x_t = torch.zeros(1, 3, config.image_size_px, config.image_size_px)
        t = torch.ones(1, dtype=torch.long)
        z, ids = torch.zeros(1, embed_dim), torch.ones(1, context, dtype=torch.long)

    def forward() -> Tensor:
        prediction, fraction = split(model(x_t, t, model.condition(z, ids)))
        return prediction.sum() if fraction is None else prediction.sum() + fraction.sum()

    return _count(model, forward)


def upsampler_cost(config: UpsamplerConfig) -> Cost:
    """Count an up-sampler for one training crop."""
    with torch.device("meta"):
        model = Upsampler(config)
        x, t = torch.zeros(1, 3, config.crop_px, config.crop_px), torch.ones(1, dtype=torch.long)
    return _count(model, lambda: model(x, t, x).sum())


class _SavedTensors(TorchFunctionMode):
    """Collects the tensors that autograd saves in a forward pass, by storage.

    Of attention it collects only the inputs and the output.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameter_ids = {id(p) for p in model.parameters()}
        self.tensors: dict[int, Tensor] = {}
        self.is_in_attention = False

    def keep(self, x: Tensor) -> Tensor:
        base = x if x._base is None else x._base
        if (
            not self.is_in_attention
            and id(base) not in self.parameter_ids
            and x.is_floating_point()
        ):
            self.tensors[id(base)] = base
        return x

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.is_in_attention = True
        y = func(*args, **(kwargs or {}))
        self.is_in_attention = False
        for x in (*args[:3], y):
            self.keep(x)
        return y


def _count(model: nn.Module, forward: Callable[[], Tensor]) -> Cost:
    noted = _SavedTensors(model)
    with (
        torch.device("meta"),
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(noted.keep, lambda x: x),
    ):
        with noted:
            loss = forward()
        loss.backward()
    activations = BF16_BYTES * sum(x.numel() for x in noted.tensors.values())
    unsharded = fsdp.unsharded_parameters(model)
    total, whole = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in unsharded)
    blocks = [
        sum(p.numel() for p in set(unit.parameters()) - unsharded) for unit in fsdp.units(model)
    ]
    return Cost(
        total,
        float(counter.get_total_flops()),
        activations,
        whole,
        total - whole - sum(blocks),
        max(blocks, default=0),
    )


class TrainingNeed(TypedDict):
    """The needs of a training."""

    parameters: int
    flops_per_image: float
    activation_bytes_per_image: int
    images: int
    batch_per_worker: int
    workers: int
    sharded: bool
    state_bytes_per_worker: int
    memory_bytes_per_worker: int
    checkpoint_bytes: int
    images_per_s: NotRequired[float]
    """This and `days`: where the throughput is known."""
    days: NotRequired[float]


def need(cost: Cost, config: LoopConfig, workers: int, flops_per_s: float | None) -> TrainingNeed:
    """Return the needs of a training on this many workers: memory of each, total FLOPs, and days.

    flops_per_s: throughput reached by each worker; None leaves days out. If the section shards,
    weights, gradients and optimiser state are divided among the workers and the gathered tensors
    are added; otherwise each worker holds all.
    """
    is_sharded, state = config.shard and workers > 1, STATE_BYTES * cost.parameters
    if is_sharded:
        divided = STATE_BYTES * (cost.parameters - cost.undivided) // workers
        state = (
            divided
            + STATE_BYTES * cost.undivided
            + HELD_BYTES * cost.held
            + PASSING_BYTES[config.precision] * cost.largest
        )
    batch = config.batch_size // workers
    costs: TrainingNeed = {
        "parameters": cost.parameters,
        "flops_per_image": cost.flops,
        "activation_bytes_per_image": cost.activation_bytes,
        "images": config.images,
        "batch_per_worker": batch,
        "workers": workers,
        "sharded": is_sharded,
        "state_bytes_per_worker": state,
        "memory_bytes_per_worker": state + batch * cost.activation_bytes,
        "checkpoint_bytes": 2 * 4 * cost.parameters,
    }
    if flops_per_s:
        costs["images_per_s"] = round(workers * flops_per_s / cost.flops, 2)
        costs["days"] = round(config.images * cost.flops / (workers * flops_per_s) / DAY_S, 3)
    return costs
