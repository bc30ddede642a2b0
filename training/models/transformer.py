"""The pre-norm transformer block that CLIP's towers, the priors and the decoder's caption encoder
share.

Legend: B batch, N tokens, D width, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.sections.clip_section import Activation

HEAD_WIDTH = 64
SHORT = 128 * 128
"""Maximum of queries times keys for which attention on a CPU is two products and a softmax."""


def heads_of(width: int) -> int:
    """Return the number of heads: one for every 64 channels as in CLIP and unCLIP, 32 in small
    models.
    """
    return max(1, width // (HEAD_WIDTH if width >= 4 * HEAD_WIDTH else HEAD_WIDTH // 2))


class KeyValues:
    """Cache of one layer's keys and values, so that each new token is computed alone."""

    def __init__(self, max_length: int) -> None:
        self.max_length, self.length = max_length, 0
        self.k = self.v = torch.empty(0)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, H, N, D/H) of the next N tokens; return those of all tokens."""
        if not self.length:
            self.k, self.v = (
                x.new_empty(*x.shape[:2], self.max_length, x.shape[3]) for x in (k, v)
            )
        end = self.length + k.shape[2]
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation of GELU in the first CLIP models.

    Hendrycks & Gimpel 2016.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x sigmoid(1.702 x), of the same shape."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v, (B, H, N, d), for q (B, H, N, d) and k, v (B, H, M, d).

    mask: bool, true where a query attends to a key. Uses the fused kernel, except for short
    sequences on a CPU, where its backward pass takes four to nine times as long in bfloat16. Its
    forward pass alone is faster in float32, by a third for CLIP's 65 tokens.
    """
    N, M = q.shape[2], k.shape[2]
    is_read_only = (
        not torch.is_grad_enabled() and mask is None and not is_causal and q.dtype == torch.float32
    )
    if q.device.type != "cpu" or N * M > SHORT or is_read_only:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    weights = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5
    if is_causal:
        mask = torch.ones(N, M, dtype=torch.bool).tril()
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf)
    return weights.softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head self-attention; `heads` = 0 chooses their number by the width."""

    def __init__(self, width: int, is_causal: bool, heads: int = 0) -> None:
        super().__init__()
        self.heads, self.is_causal = heads or heads_of(width), is_causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, is_key: Tensor | None = None, past: KeyValues | None = None
    ) -> Tensor:
        """Map (B, N, D) to (B, N, D).

        The N tokens follow the P tokens of `past`, which stores them too. is_key: bool (B, P + N),
        which tokens may be attended to (default: all).
        """
        B, N, D = x.shape
        q, k, v = (
            self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        )  # each (B, H, N, D/H)
        if past is not None:
            k, v = past.append(k, v)
        M = k.shape[2]
        if is_key is None and (not self.is_causal or N in (1, M)):
            y = attend(q, k, v, is_causal=self.is_causal and N == M)
        else:
            mask = torch.ones(N, M, dtype=torch.bool, device=x.device)
            if self.is_causal:
                mask = mask.tril(M - N)
            mask = mask.expand(B, 1, N, M) if is_key is None else mask & is_key[:, None, None, :]
            y = attend(q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(B, N, D))

    def at(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return forward(x)[b, positions[b]], (B, D), without the queries of all other tokens.

        positions: int (B,). Without gradients, keys and values are not computed either: q . (W_k x
        + b_k) is (q W_k) . x plus a constant that softmax removes, and the output is W_v applied to
        the weighted mean of x.
        """
        B, N, D = x.shape
        query = x[torch.arange(B, device=x.device), positions]
        q = (
            F.linear(query, self.qkv.weight[:D], self.qkv.bias[:D])
            .view(B, 1, self.heads, -1)
            .transpose(1, 2)
        )  # (B, H, 1, D/H)
        if not torch.is_grad_enabled():
            of_k, of_v = self.qkv.weight[D:].view(
                2, self.heads, D // self.heads, D
            )  # each (H, D/H, D)
            scores = (
                torch.einsum("bhd,hde->bhe", q[:, :, 0], of_k) @ x.transpose(1, 2)
            ).float() * q.shape[-1] ** -0.5  # (B, H, N)
            if self.is_causal:
                scores = scores.masked_fill(
                    torch.arange(N, device=x.device) > positions[:, None, None], -torch.inf
                )
            mean = scores.softmax(-1).to(x.dtype) @ x  # (B, H, D)
            return self.out(
                torch.einsum("bhe,hde->bhd", mean, of_v).reshape(B, D) + self.qkv.bias[2 * D :]
            )
        k, v = (
            F.linear(x, self.qkv.weight[D:], self.qkv.bias[D:])
            .view(B, N, 2, self.heads, -1)
            .permute(2, 0, 3, 1, 4)
        )
        mask = (
            (torch.arange(N, device=x.device) <= positions[:, None])[:, None, None]
            if self.is_causal
            else None
        )  # (B, 1, 1, N)
        return self.out(attend(q, k, v, mask).reshape(B, D))


class Block(nn.Module):
    """Attention and an MLP (four times the width by default), each with a residual connection."""

    def __init__(
        self,
        width: int,
        is_causal: bool,
        heads: int = 0,
        mlp_width: int = 0,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, is_causal, heads)
        inner = mlp_width or 4 * width
        self.mlp = nn.Sequential(
            nn.Linear(width, inner), ACTIVATIONS[activation](), nn.Linear(inner, width)
        )

    def forward(
        self, x: Tensor, is_key: Tensor | None = None, past: KeyValues | None = None
    ) -> Tensor:
        """Map (B, N, D) to (B, N, D); `is_key` and `past` as in Attention."""
        x = x + self.attention(self.norm_1(x), is_key, past)
        return x + self.mlp(self.norm_2(x))

    def at(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return forward(x)[b, positions[b]], (B, D), at a sixth of the cost.

        The last block of a tower needs no other output.
        """
        y = x[torch.arange(len(x), device=x.device), positions] + self.attention.at(
            self.norm_1(x), positions
        )
        return y + self.mlp(self.norm_2(y))


class TextEncoder(nn.Module):
    """Token and position embeddings and a causal transformer.

    Needs no mask, since padding comes after the text and cannot reach it.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        width: int,
        depth: int,
        heads: int = 0,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.randn(context, width) * 0.01)
        self.blocks = nn.Sequential(
            *(Block(width, True, heads, activation=activation) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (B, N) to hidden states (B, N, D)."""
        return self.norm(self.blocks(self.tokens(ids) + self.positions[: ids.shape[1]]))

    def at(self, ids: Tensor, columns: Tensor) -> Tensor:
        """Return forward(ids)[b, columns[b]], (B, D), without the last block's work on other
        tokens.

        The depth must be at least 1.
        """
        x = self.blocks[:-1](self.tokens(ids) + self.positions[: ids.shape[1]])
        return self.norm(self.blocks[-1].at(x, columns))  # type: ignore[operator]


def time_features(t: Tensor, width: int) -> Tensor:
    """Return sines and cosines of t, int (B,), as float32 (B, width) (Vaswani et al. 2017).

    They have `width / 2` frequencies, from 1 to 1/10,000.
    """
    half = width // 2
    angle = t.float()[:, None] * torch.exp(
        -math.log(10_000) * torch.arange(half, device=t.device) / half
    )
    return torch.cat([angle.cos(), angle.sin()], 1)
