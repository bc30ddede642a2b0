"""Text to image with a trained run: caption -> z_t -> prior -> z_i -> decoder -> picture. Plain
torch: no Ray, no Prefect, no network.

Every picture depends on its prompt, its seed and its place among that prompt's pictures alone.
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
from training.models.decoder import Decoder, DecoderConfig
from training.models.pixels import to_images
from training.models.priors import AnyPrior
from training.models.tokenizer import Tokenizer

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
        """Folders of what enlarges pictures, in their order; read when that is first asked for."""

    @classmethod
    def load(
        cls,
        folder: Path | str,
        prior: Path | None = None,
        decoder: Path | None = None,
        device: str = "cpu",
    ) -> Self:
        """Read an exported folder; or, given all three, those of the stages `clip`, `prior` and
        `decoder`. Averaged weights in both cases.

        An exported folder's up-samplers come along. Raises CallerError where the folder is neither.
        """
        behind = (
            ()
            if prior and decoder
            else (Path(folder) / name for name in ("upsampler", "upsampler_2"))
        )
        clip, prior, decoder = _folders(Path(folder), prior, decoder)
        model, tokenizer = clip_model.load(clip)
        a_prior = priors.load(prior)
        facts = json.loads((decoder / "config.json").read_text())
        a_decoder = Decoder(
            DecoderConfig.model_validate(facts["decoder"]),
            facts["embed_dim"],
            facts["vocab_size"],
            facts["context"],
        )
        a_decoder.load_state_dict(load_file(decoder / "weights.safetensors"))
        for part in (model, a_prior, a_decoder):
            part.eval().requires_grad_(False).to(device)
        return cls(
            model,
            tokenizer,
            a_prior,
            a_decoder,
            [folder for folder in behind if (folder / "config.json").is_file()],
        )

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.decoder.device

    @cached_property
    def _enlargers(self) -> "list[Upsampler]":
        from training.models import upsampler_cascade as upsamplers  # which few ask for

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
        """Draw `count` pictures of each prompt, uint8 (P, count, S, S, 3) RGB; equal arguments give
        equal pictures.

        seed: one for all prompts, whose noise is then the same from prompt to prompt, or one for
        each: what is judged as a set of pictures needs noise of its own in every one. upsample:
        enlarge them by the up-samplers; CallerError where there are none.
        """
        if upsample and not self.upsamplers:
            raise CallerError(
                "this system has no up-sampler: give its recipe [upsampler] and run it, or draw "
                "without upsample"
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
        """Draw one z_i for each prompt by the prior, unit vectors float32 (P, E): that of
        `generate`'s first picture; seed as there.
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
        """Embed pictures, uint8 (B, H, W, 3), as unit vectors float32 (B, E)."""
        return clip_model.embed_images(self.clip, torch.from_numpy(images)).numpy()


def _seed_per_prompt(seed: int | Sequence[int], prompts: list[str]) -> Sequence[int]:
    """Return a seed for every prompt."""
    if isinstance(seed, int):
        return [seed] * len(prompts)
    if len(seed) != len(prompts):
        raise ValueError(f"{len(seed)} seeds for {len(prompts)} prompts: give one, or one for each")
    return seed


def _folders(folder: Path, prior: Path | None, decoder: Path | None) -> tuple[Path, Path, Path]:
    """Return the folders of the three models."""
    parts = (
        (folder, prior, decoder)
        if prior and decoder
        else (folder / "clip", folder / "prior", folder / "decoder")
    )
    for part in parts:
        if not (part / "config.json").is_file():
            raise CallerError(f"{part} holds no model: give a folder that `unclip export` made")
    return parts
