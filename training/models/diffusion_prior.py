"""The diffusion prior: predicts a CLIP image embedding z_i from a caption and its CLIP text
embedding z_t (unCLIP, section 2.2).

A causal transformer over [text tokens, z_t, timestep, noised z_i, query]; the output at the query
predicts z_i itself. Embeddings are scaled by the square root of their dimension, or to the variance
that the recipe sets. Knows nothing of images or files.
Legend: B batch, N tokens, D width, E embedding dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.errors import DataError
from training.diffusion import samplers
from training.diffusion.noise import Stream, generators, noise
from training.diffusion.process import Schedule, as_denoise
from training.diffusion.variance import measure_x_0_error
from training.models.tokenizer import PAD
from training.models.transformer import Block, time_features
from training.optim.step import Step
from training.sections.prior_section import PriorConfig

NULL_TEXT = torch.tensor([1, 2])  # start, end: the ids of a dropped caption
MAX_MEASURED = 256
"""Number of pairs on which the errors for the analytic variance are measured."""
DROP, TIME, NOISE = 1, 2, 3  # streams of randomness in a step


def without_captions(ids: Tensor, dropped: Tensor) -> Tensor:
    """Return caption ids (B, N) with the empty caption where `dropped`, bool (B,)."""
    null = torch.full_like(ids, PAD)
    null[:, :2] = NULL_TEXT.to(ids.device)
    return torch.where(dropped[:, None], null, ids)


class Prior(nn.Module):
    """Predicts z_i from a noised z_i; works on scaled embeddings, `scale` times a unit vector."""

    scale: Tensor
    x_0_error: Tensor

    def __init__(self, config: PriorConfig, embed_dim: int, vocab_size: int, context: int) -> None:
        super().__init__()
        D = config.width
        self.config = config
        # The schedule's values are checked, which `count_parameters`' meta device cannot do.
        with torch.device("cpu"):
            self.schedule = Schedule.cosine(config.T)
        self.tokens = nn.Embedding(vocab_size, D)
        self.positions = nn.Parameter(torch.randn(context + 4, D) * 0.01)
        self.from_text, self.from_noised = nn.Linear(embed_dim, D), nn.Linear(embed_dim, D)
        self.from_time = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.query = nn.Parameter(torch.randn(D) * 0.02)
        self.null_text = nn.Parameter(torch.zeros(embed_dim))
        self.blocks = nn.ModuleList(Block(D, is_causal=True) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D)
        self.out = nn.Linear(D, embed_dim)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.register_buffer("scale", torch.tensor(float(embed_dim) ** 0.5))
        if config.sampler == "analytic":
            self.register_buffer("x_0_error", torch.zeros(config.T + 1, dtype=torch.float64))

    @torch.no_grad()
    def fit_to(self, z_i: Tensor, z_t: Tensor) -> None:
        """Set the embedding scale from training embeddings, unit vectors z_i (M, E).

        Does nothing if the config sets no variance. Raises DataError if all embeddings are equal.
        """
        if self.config.variance is not None:
            spread = (z_i - z_i.mean(0)).square().mean(dtype=torch.float64)
            if not float(spread) > 0:
                raise DataError(
                    "all image embeddings are equal: the prior has nothing to learn; check the CLIP"
                )
            self.scale.fill_(float((self.config.variance / spread) ** 0.5))

    @torch.no_grad()
    def measure(self, z_i: Tensor, z_t: Tensor, ids: Tensor) -> None:
        """Measure the errors in z_i that the analytic variance needs; call it after training.

        Takes pairs of unit vectors (M, E) and ids (M, N).
        """
        x_0, scaled = z_i * self.scale, z_t * self.scale
        denoise = as_denoise(lambda x_t, t: self(x_t, t, scaled, ids), self.schedule, "x_0")
        self.x_0_error.copy_(
            measure_x_0_error(
                denoise, x_0, self.schedule, generator=generators(range(len(x_0)), Stream.DATA)
            )
        )

    def forward(self, x_t: Tensor, t: Tensor, z_t: Tensor, ids: Tensor) -> Tensor:
        """Predict the scaled z_i, (B, E).

        Takes a noised z_i (B, E), times (B,), scaled z_t (B, E) and caption ids (B, N).
        """
        N = ids.shape[1]
        last = torch.stack(
            [
                self.from_text(z_t),
                self.from_time(time_features(t, self.config.width)),
                self.from_noised(x_t),
            ],
            1,
        )
        x = torch.cat(
            [self.tokens(ids), last, self.query.expand(len(ids), 1, -1)], 1
        )  # (B, N + 4, D)
        x = x + torch.cat([self.positions[4 : N + 4], self.positions[:4]])
        is_key = torch.cat(
            [ids != PAD, torch.ones(len(ids), 4, dtype=torch.bool, device=ids.device)], 1
        )
        for block in self.blocks:
            x = block(x, is_key)
        return self.out(self.norm(x[:, -1])).float()

    def loss(self, step: Step, z_i: Tensor, z_t: Tensor, ids: Tensor) -> Tensor:
        """Return the mean squared error of the scaled z_i.

        z_i and z_t are unit vectors (b, E), ids (b, N).
        """
        dropped = (step.uniform(DROP) < self.config.text_drop).to(z_t.device)
        t = (1 + step.uniform(TIME) * self.config.T).long().clamp_(max=self.config.T).to(z_t.device)
        x_0 = z_i * self.scale
        x_t = self.schedule.q_sample(x_0, t, step.normal(NOISE, x_0.shape[1]).to(x_0.device))
        return F.mse_loss(self(x_t, t, *self.with_drops(z_t, ids, dropped)), x_0)

    def with_drops(self, z_t: Tensor, ids: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scaled z_t and the ids, with the null text where `dropped`, bool (B,)."""
        return torch.where(dropped[:, None], self.null_text, z_t * self.scale), without_captions(
            ids, dropped
        )

    @torch.no_grad()
    def sample(
        self,
        z_t: Tensor,
        ids: Tensor,
        seeds: list[int],
        steps: int | None = None,
        best_of: int | None = None,
    ) -> Tensor:
        """Draw one z_i, a unit vector, for every row of z_t (B, E), ids (B, N) and seeds.

        It is the candidate out of `best_of` with the largest dot product with z_t. A row's result
        depends only on its own seed and text, not on the batch.
        """
        best_of = best_of or self.config.best_of
        rows = torch.arange(len(z_t)).repeat_interleave(best_of)
        scaled, text = z_t[rows] * self.scale, ids[rows]
        draws = generators(
            [seed * best_of + draw_number for seed in seeds for draw_number in range(best_of)],
            Stream.PRIOR,
        )
        x_T = noise((len(rows), z_t.shape[1]), draws, z_t.device)
        denoise = as_denoise(lambda x_t, t: self(x_t, t, scaled, text), self.schedule, "x_0")
        count = steps or self.config.sampling_steps
        if self.config.sampler == "analytic":
            z_i = samplers.ancestral(
                denoise,
                x_T,
                self.schedule,
                count,
                "analytic",
                self.x_0_error.cpu(),
                options=samplers.SamplerOptions(generator=draws),
            )
        else:
            z_i = samplers.ddim(
                denoise,
                x_T,
                self.schedule,
                count,
                eta=1.0,
                options=samplers.SamplerOptions(generator=draws),
            )
        z_i = F.normalize(z_i, dim=-1).view(len(z_t), best_of, -1)
        best = (z_i * z_t[:, None]).sum(-1).argmax(1)
        return z_i[torch.arange(len(z_t)), best]
