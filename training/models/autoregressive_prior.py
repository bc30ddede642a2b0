"""The autoregressive prior: samples z_i one principal component at a time, as buckets (unCLIP,
section 2.2).

A causal transformer over [caption, z_t, dot product, c_1, ..., c_(K-1)]. The output at z_t predicts
the bucket of z_i . z_t, the output at that token predicts the bucket of the first coordinate, and
so on. At sampling the dot product is drawn from the upper half of its distribution, for images that
fit their caption. Same interface as `training.models.diffusion_prior.Prior`; the buckets are fitted
to the data before training.
Legend: B batch, N caption tokens, D width, E embedding dimensions, K components, V buckets.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.diffusion.noise import Stream, generators
from training.models.diffusion_prior import DROP, without_captions
from training.models.pca import Pca
from training.models.tokenizer import PAD
from training.models.transformer import Block, KeyValues
from training.optim.step import Step
from training.sections.prior_section import PriorConfig

MARGIN = 1e-3
"""Share of the training data's range by which the buckets extend beyond it."""


class AutoregressivePrior(nn.Module):
    """Predicts the buckets of z_i's coordinates one after another."""

    mean: Tensor
    components: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, config: PriorConfig, embed_dim: int, vocab_size: int, context: int) -> None:
        super().__init__()
        D, K = config.width, config.pca_dims
        if embed_dim < K:
            raise ValueError(
                f"pca_dims = {K} but embeddings have {embed_dim} dimensions: use at most that many"
            )
        self.config = config
        self.tokens = nn.Embedding(vocab_size, D)
        self.values = nn.Embedding(config.buckets, D)
        self.positions = nn.Parameter(torch.randn(context + K + 1, D) * 0.01)
        self.from_text = nn.Linear(embed_dim, D)
        self.null_text = nn.Parameter(torch.zeros(embed_dim))
        self.blocks = nn.ModuleList(Block(D, is_causal=True) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D)
        self.out = nn.Linear(D, config.buckets)
        for table in (self.tokens, self.values):
            nn.init.normal_(table.weight, std=0.02)
        self.text_scale = embed_dim**0.5
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("components", torch.zeros(K, embed_dim))
        self.register_buffer("low", torch.zeros(K + 1))
        self.register_buffer("high", torch.ones(K + 1))

    @torch.no_grad()
    def fit_to(self, z_i: Tensor, z_t: Tensor) -> None:
        """Fit components and buckets to training embeddings, unit vectors z_i and z_t (M, E).

        z_t is the embedding of one caption of each image.
        """
        pca = Pca.fit(z_i.cpu())
        self.mean.copy_(pca.mean)
        self.components.copy_(pca.components[: self.config.pca_dims])
        values = torch.cat(
            [
                (z_i.cpu() * z_t.cpu()).sum(1, keepdim=True),
                pca.project(z_i.cpu(), self.config.pca_dims),
            ],
            1,
        )
        low, high = values.amin(0), values.amax(0)
        reach = MARGIN * (high - low) + 1e-6
        self.low.copy_(low - reach)
        self.high.copy_(high + reach)

    def to_buckets(self, z_i: Tensor, z_t: Tensor) -> Tensor:
        """Return the buckets of z_i . z_t and of z_i's coordinates, int64 (B, K + 1).

        Values outside the range go into the first or the last bucket.
        """
        values = torch.cat(
            [(z_i * z_t).sum(1, keepdim=True), (z_i - self.mean) @ self.components.T], 1
        )
        return (
            ((values - self.low) / (self.high - self.low) * self.config.buckets)
            .long()
            .clamp_(0, self.config.buckets - 1)
        )

    def from_buckets(self, buckets: Tensor) -> Tensor:
        """Return the unit vectors (B, E) at the centres of buckets (B, K + 1)."""
        values = self.low + (buckets + 0.5) / self.config.buckets * (self.high - self.low)
        return F.normalize(values[:, 1:] @ self.components + self.mean, dim=-1)

    def forward(self, buckets: Tensor, z_t: Tensor, ids: Tensor) -> Tensor:
        """Return logits of all buckets, float32 (B, K + 1, V), each from the buckets before it.

        Takes buckets (B, K + 1), scaled z_t (B, E) and ids (B, N).
        """
        x, is_key = self._prefix(z_t, ids, buckets[:, :-1])
        for block in self.blocks:
            x = block(x, is_key)
        return self.out(self.norm(x[:, ids.shape[1] :])).float()

    def _prefix(self, z_t: Tensor, ids: Tensor, buckets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens [caption, z_t, buckets] (B, N + 1 + n, D) and which of them are keys.

        buckets (B, n) may be empty.
        """
        K, N, n = self.config.pca_dims, ids.shape[1], buckets.shape[1]
        x = torch.cat([self.tokens(ids), self.from_text(z_t)[:, None], self.values(buckets)], 1)
        x = x + torch.cat([self.positions[K + 1 : K + 1 + N], self.positions[: n + 1]])
        return x, torch.cat([ids != PAD, ids.new_ones(len(ids), n + 1, dtype=torch.bool)], 1)

    def loss(self, step: Step, z_i: Tensor, z_t: Tensor, ids: Tensor) -> Tensor:
        """Return the mean cross entropy of the buckets in nats.

        z_i and z_t are unit vectors (b, E), ids (b, N).
        """
        dropped = (step.uniform(DROP) < self.config.text_drop).to(z_t.device)
        # bfloat16 would move values by whole buckets
        with torch.autocast(z_i.device.type, enabled=False):
            buckets = self.to_buckets(z_i, z_t)
        return F.cross_entropy(
            self(buckets, *self.with_drops(z_t, ids, dropped)).flatten(0, 1), buckets.flatten()
        )

    def with_drops(self, z_t: Tensor, ids: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scaled z_t and the ids, with the null text where `dropped`, bool (B,)."""
        return torch.where(
            dropped[:, None], self.null_text, z_t * self.text_scale
        ), without_captions(ids, dropped)

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
        depends only on its own seed and text. `steps` belongs to the diffusion prior and is
        ignored.
        """
        best_of = best_of or self.config.best_of
        rows = torch.arange(len(z_t), device=z_t.device).repeat_interleave(best_of)
        K = self.config.pca_dims
        draws = generators(
            [seed * best_of + draw_number for seed in seeds for draw_number in range(best_of)],
            Stream.PRIOR,
        )
        chance = torch.stack(
            [
                torch.rand(K + 1, generator=draw_generator, dtype=torch.float64)
                for draw_generator in draws
            ]
        ).to(z_t.device)  # (B', K + 1)
        chance[:, 0] = 0.5 + chance[:, 0] / 2  # the upper half
        buckets = self.draw(z_t[rows] * self.text_scale, ids[rows], chance)
        z_i = self.from_buckets(buckets).view(len(z_t), best_of, -1)
        best = (z_i * z_t[:, None]).sum(-1).argmax(1)
        return z_i[torch.arange(len(z_t), device=z_t.device), best]

    @torch.no_grad()
    def draw(self, z_t: Tensor, ids: Tensor, chance: Tensor) -> Tensor:
        """Draw buckets, int64 (B, K + 1), by inverting the cumulative distribution at `chance`.

        chance: in [0, 1), (B, K + 1).
        """
        N, K = ids.shape[1], self.config.pca_dims
        pasts = [KeyValues(N + 1 + K) for _ in self.blocks]
        x, is_key = self._prefix(z_t, ids, ids.new_empty(len(ids), 0))
        buckets = ids.new_empty(len(ids), K + 1)
        for position in range(K + 1):
            for block, past in zip(self.blocks, pasts, strict=True):
                x = block(x, is_key, past)
            logits = self.out(self.norm(x[:, -1])).double() / self.config.temperature
            cumulated = logits.softmax(-1).cumsum(-1)
            buckets[:, position] = torch.searchsorted(
                cumulated, chance[:, position : position + 1].contiguous(), right=True
            )[:, 0].clamp(max=self.config.buckets - 1)
            x = (
                (self.values(buckets[:, position]) + self.positions[position + 1])[:, None]
                if position < K
                else x
            )
            is_key = torch.cat([is_key, is_key.new_ones(len(ids), 1)], 1)
        return buckets
