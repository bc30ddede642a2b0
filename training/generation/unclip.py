"""Text to image with a trained run: caption -> z_t -> prior -> z_i -> decoder -> image.

Plain torch: no Ray, no Prefect, no network. An image depends only on its prompt, its seed and its
number among the prompt's images.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from infra.errors import CallerError
from training.models import clip as clip_model
from training.models import priors
from training.models.clip import CLIP
from training.models.decoder import Decoder
from training.models.pixels import to_images
from training.models.priors import AnyPrior
from training.models.tokenizer import Tokenizer
from training.sections.decoder_section import DecoderConfig

if TYPE_CHECKING:
    from training.models.upsampler import Upsampler

BATCH = 64
SEED_STRIDE = 1_000_003


class Unclip:
    """A trained text-to-image system."""

    def __init__(
        self,
        clip: CLIP,
        tokenizer: Tokenizer,
        prior: AnyPrior,
        decoder: Decoder,
        upsamplers: Sequence[Path] = (),
    ) -> None:
        self.clip, self.tokenizer, self.prior, self.decoder = clip, tokenizer, prior, decoder
        self.upsamplers = tuple(upsamplers)
        """Folders of the up-samplers in order; loaded when they are first needed."""

    @classmethod
    def load(
        cls,
        folder: Path | str,
        prior: Path | None = None,
        decoder: Path | None = None,
        device: str = "cpu",
    ) -> Self:
        """Read an exported folder; or, if `prior` and `decoder` are given, the folders of the three
        stages.

        Loads averaged weights. An exported folder's up-samplers are loaded too. Raises CallerError
        if a folder holds no model.
        """
        is_exported = not (prior and decoder)
        names = ("upsampler", "upsampler_2") if is_exported else ()
        upsamplers = [Path(folder) / name for name in names]
        clip, prior, decoder = _folders(Path(folder), prior, decoder)
        model, tokenizer = clip_model.load(clip)
        prior_model = priors.load(prior)
        facts = json.loads((decoder / "config.json").read_text())
        decoder_model = Decoder(
            DecoderConfig.model_validate(facts["decoder"]),
            facts["embed_dim"],
            facts["vocab_size"],
            facts["context"],
        )
        decoder_model.load_state_dict(load_file(decoder / "weights.safetensors"))
        for part in (model, prior_model, decoder_model):
            part.eval().requires_grad_(False).to(device)
        return cls(
            model,
            tokenizer,
            prior_model,
            decoder_model,
            [path for path in upsamplers if (path / "config.json").is_file()],
        )

    @property
    def device(self) -> torch.device:
        """Device of the models."""
        return self.decoder.device

    @cached_property
    def _enlargers(self) -> "list[Upsampler]":
        from training.models import upsampler_cascade as upsamplers  # rarely needed

        return [upsamplers.load(folder).to(self.device) for folder in self.upsamplers]

    def generate(
        self,
        prompts: list[str],
        count: int = 1,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        upsample: bool = False,
    ) -> np.ndarray:
        """Draw `count` images of each prompt, uint8 (P, count, S, S, 3) RGB.

        Equal arguments give equal images. seed: one for all prompts, which then share their noise,
        or one for each prompt, for images that are judged as a set. upsample: enlarge the images
        with the up-samplers; raises CallerError if there are none.
        """
        if upsample and not self.upsamplers:
            raise CallerError(
                "this system has no up-sampler: add [upsampler] to its recipe and run it, or "
                "generate without upsample"
            )
        z_t = clip_model.embed_texts(self.clip, self.tokenizer, prompts).to(self.device)
        ids = self.tokenizer(prompts).to(self.device)
        rows = torch.arange(len(prompts)).repeat_interleave(count)
        seeds = [
            base_seed * SEED_STRIDE + number
            for base_seed in _seed_per_prompt(seed, prompts)
            for number in range(count)
        ]
        pictures: list[Tensor] = []
        for start in range(0, len(rows), BATCH):
            part, part_seeds = rows[start : start + BATCH], seeds[start : start + BATCH]
            z_i = self.prior.sample(z_t[part], ids[part], part_seeds)
            pictures.append(self.decoder.sample(z_i, ids[part], part_seeds, steps, guidance))
        drawn = to_images(torch.cat(pictures))
        if upsample:
            from training.models import upsampler_cascade as upsamplers

            drawn = upsamplers.enlarge(self._enlargers, drawn, seeds)
        return drawn.reshape(len(prompts), count, *drawn.shape[1:])

    def predict(
        self, prompts: list[str], seed: int | Sequence[int] = 0, best_of: int | None = None
    ) -> np.ndarray:
        """Draw one z_i for each prompt with the prior, unit vectors float32 (P, E).

        It is the z_i of the first image of `generate`; `seed` as there.
        """
        z_t = clip_model.embed_texts(self.clip, self.tokenizer, prompts).to(self.device)
        ids = self.tokenizer(prompts).to(self.device)
        parts = [slice(start, start + BATCH) for start in range(0, len(prompts), BATCH)]
        draw_seeds = [base_seed * SEED_STRIDE for base_seed in _seed_per_prompt(seed, prompts)]
        return (
            torch.cat(
                [
                    self.prior.sample(z_t[part], ids[part], draw_seeds[part], best_of=best_of)
                    for part in parts
                ]
            )
            .cpu()
            .numpy()
        )

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """Embed texts as unit vectors float32 (B, E)."""
        return clip_model.embed_texts(self.clip, self.tokenizer, texts).numpy()

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        """Embed images, uint8 (B, H, W, 3), as unit vectors float32 (B, E)."""
        return clip_model.embed_images(self.clip, torch.from_numpy(images)).numpy()


def _seed_per_prompt(seed: int | Sequence[int], prompts: list[str]) -> Sequence[int]:
    """Return one seed for every prompt."""
    if isinstance(seed, int):
        return [seed] * len(prompts)
    if len(seed) != len(prompts):
        raise ValueError(f"{len(seed)} seeds for {len(prompts)} prompts: pass one, or one for each")
    return seed


def _folders(folder: Path, prior: Path | None, decoder: Path | None) -> tuple[Path, Path, Path]:
    """Return the folders of CLIP, prior and decoder. Raises CallerError if one holds no model."""
    parts = (
        (folder, prior, decoder)
        if prior and decoder
        else (folder / "clip", folder / "prior", folder / "decoder")
    )
    for part in parts:
        if not (part / "config.json").is_file():
            raise CallerError(f"{part} holds no model: use a folder written by `unclip export`")
    return parts
