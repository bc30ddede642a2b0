"""The two priors behind one interface (`fit_to`, `loss`, `sample`): choice by recipe, loading,
parameter count.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from training.models.autoregressive_prior import AutoregressivePrior
from training.models.diffusion_prior import Prior
from training.sections.clip_section import ClipConfig
from training.sections.prior_section import PriorConfig

AnyPrior = Prior | AutoregressivePrior


def make(config: PriorConfig, embed_dim: int, vocab_size: int, context: int) -> AnyPrior:
    """Return an untrained prior of the config's kind."""
    kind = Prior if config.kind == "diffusion" else AutoregressivePrior
    return kind(config, embed_dim, vocab_size, context)


def load(folder: Path) -> AnyPrior:
    """Read a trained prior (averaged weights) from a `prior` stage's folder, in evaluation mode."""
    facts = json.loads((folder / "config.json").read_text())
    model = make(
        PriorConfig.model_validate(facts["prior"]),
        facts["embed_dim"],
        facts["vocab_size"],
        facts["context"],
    )
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model.eval().requires_grad_(False)


def count_parameters(
    config: PriorConfig, clip: ClipConfig, vocab_size: int, context: int = 77
) -> int:
    """Count the prior's parameters without allocating them."""
    with torch.device("meta"):
        return sum(
            p.numel() for p in make(config, clip.embed_dim, vocab_size, context).parameters()
        )
