"""The pre-norm transformer block that CLIP's towers, the prior and the decoder's caption encoder
share.

Legend: B batch, N tokens, D width, H heads.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 64
SHORT = 128 * 128
"""Queries times keys up to which attention on a CPU is two products and a softmax."""

Activation = Literal["gelu", "quick_gelu"]


def heads_of(width: int) -> int:
    """Return the number of heads: 64 channels each as in CLIP and unCLIP, 32 in small models."""
    return max(1, width // (HEAD_WIDTH if width >= 4 * HEAD_WIDTH else HEAD_WIDTH // 2))


class KeyValues:
    """The keys and values of one layer for the tokens so far, so that a next token costs itself
    alone.
    """

    def __init__(self, max_length: int) -> None:
        self.most, self.length = max_length, 0
        self.k = self.v = torch.empty(0)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, H, N, D/H) of the next N tokens; return those of all tokens so
        far.
        """
        if not self.length:
            self.k, self.v = (x.new_empty(*x.shape[:2], self.most, x.shape[3]) for x in (k, v))
        end = self.length + k.shape[2]
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation that the first CLIP models were trained with (Hendrycks
    & Gimpel 2016).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to itself."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v, (B, H, N, d), for q (B, H, N, d) and k, v (B, H, M, d);
    `mask`, bool, says who attends to whom.

    By the fused kernel, but for short sequences on a CPU, where its backward pass takes four to
    nine times as long in bfloat16. Its forward pass alone is the faster one in float32, by a third
    at CLIP's 65 tokens.
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
    """Multi-head self-attention through the fused kernel; `heads` of 0 are chosen by the width."""

    def __init__(self, width: int, is_causal: bool, heads: int = 0) -> None:
        super().__init__()
        self.heads, self.is_causal = heads or heads_of(width), is_causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, is_key: Tensor | None = None, past: KeyValues | None = None
    ) -> Tensor:
        """Map (B, N, D) to (B, N, D), the N tokens standing behind the P of `past`, which takes
        them in.

        `is_key`, bool (B, P + N), says which tokens may be attended to (all, unless given).
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
        """Return forward(x)[b, places[b]], (B, D), without the queries of all other tokens; places
        is int (B,).

        Without gradients keys and values are not made either: q . (W_k x + b_k) is (q W_k) . x and
        a constant, which softmax drops, and what the token takes from the others goes through W_v
        as their weighted mean.
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
    """Attention and a wider perceptron (four times, unless said), each added to what came in."""

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
        """Return forward(x)[b, places[b]], (B, D): all that the last block of a tower is read at,
        at a sixth of the work.
        """
        y = x[torch.arange(len(x), device=x.device), positions] + self.attention.at(
            self.norm_1(x), positions
        )
        return y + self.mlp(self.norm_2(y))


class TextEncoder(nn.Module):
    """Token and position embeddings and a causal transformer; padding behind a text cannot reach
    it, so no mask is needed.
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
        tokens; depth must be at least 1.
        """
        x = self.blocks[:-1](self.tokens(ids) + self.positions[: ids.shape[1]])
        return self.norm(self.blocks[-1].at(x, columns))  # type: ignore[operator]


def time_features(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of t, int (B,), at `width / 2` frequencies from 1 to 1/10,000 (Vaswani et
    al. 2017), float32 (B, width).
    """
    half = width // 2
    angle = t.float()[:, None] * torch.exp(
        -math.log(10_000) * torch.arange(half, device=t.device) / half
    )
    return torch.cat([angle.cos(), angle.sin()], 1)
