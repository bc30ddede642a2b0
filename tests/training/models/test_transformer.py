"""Attention is the fused kernel's however it is computed; a last block, computed only where it is
read, says what the whole one does.
"""

import pytest
import torch
import torch.nn.functional as F

from training.models.transformer import Attention, Block, QuickGELU, TextEncoder, attend

FUSED = F.scaled_dot_product_attention


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_block_at_one_place_is_the_block_there(is_causal: bool, activation: str) -> None:
    torch.manual_seed(0)
    block = Block(48, is_causal, heads=3, mlp_width=64, activation=activation)  # type: ignore[arg-type]
    x, places = torch.randn(5, 7, 48, requires_grad=True), torch.tensor([0, 6, 3, 3, 1])
    whole = block(x)[torch.arange(5), places]
    part = block.at(x, places)
    torch.testing.assert_close(part, whole, atol=1e-6, rtol=1e-5)
    weight = torch.randn(5, 48)
    for a, b in zip(
        *(torch.autograd.grad((y * weight).sum(), [x, *block.parameters()]) for y in (part, whole)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_text_at_its_end_is_the_hidden_state_there() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(20, 9, 32, 2)
    ids, places = torch.randint(0, 20, (4, 7)), torch.tensor([6, 2, 0, 5])
    torch.testing.assert_close(
        encoder.at(ids, places), encoder(ids)[torch.arange(4), places], atol=1e-6, rtol=1e-5
    )
    with_other_ends = ids.clone()
    with_other_ends[1, 3:] = 0
    torch.testing.assert_close(encoder.at(with_other_ends, places)[1], encoder.at(ids, places)[1])


def test_quick_gelu_is_near_gelu_but_not_it() -> None:
    x = torch.linspace(-4, 4, 41)
    gap = (QuickGELU()(x) - torch.nn.functional.gelu(x)).abs()
    assert 0.005 < float(gap.max()) < 0.03


@pytest.mark.parametrize("kind", ["all", "causal", "mask"])
def test_attention_of_short_sequences_is_the_fused_kernels(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(3, 2, count, 8, requires_grad=True)
        for count in (5, 5 if kind == "causal" else 9, 5 if kind == "causal" else 9)
    )
    mask = torch.rand(3, 1, 5, 9) < 0.6 if kind == "mask" else None
    if mask is not None:
        mask[..., 0] = True
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kind == "causal")
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", None)  # it must do without
        ours = attend(q, k, v, mask, kind == "causal")
    torch.testing.assert_close(ours, fused, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(fused)
    for a, b in zip(
        *(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (ours, fused)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_attention_in_bfloat16_rounds_like_the_fused_kernel() -> None:
    torch.manual_seed(0)
    whole = [torch.randn(4, 2, 16, 32) for _ in range(3)]
    exact = F.scaled_dot_product_attention(*(x.bfloat16().float() for x in whole))
    errors = [
        float((y.float() - exact).abs().max())
        for y in (f(*(x.bfloat16() for x in whole)) for f in (attend, FUSED))
    ]
    assert (
        errors[0] <= 2 * errors[1]
        and attend(*(x.bfloat16() for x in whole)).dtype == torch.bfloat16
    )


def test_attention_of_long_sequences_holds_no_table_of_all_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *given, **more: called.append(given) or given[2]
    )
    long = torch.randn(1, 1, 129, 4)
    attend(long[:, :, :128], long[:, :, :128], long[:, :, :128])
    assert not called
    attend(long, long, long)
    assert len(called) == 1


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_token_read_without_gradients_needs_no_keys_and_values(
    is_causal: bool, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    attention = Attention(24, is_causal, heads)
    with torch.no_grad():
        attention.qkv.bias.normal_()
    x, places = torch.randn(4, 9, 24), torch.tensor([0, 8, 3, 5])
    expected = attention(x)[torch.arange(4), places]
    assert torch.allclose(attention.at(x, places), expected, atol=1e-5)  # what is trained on
    monkeypatch.setattr("training.models.transformer.attend", None)
    with torch.no_grad():
        assert torch.allclose(attention.at(x, places), expected, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(attention.at(x, places).float(), expected, atol=0.06)


def test_attention_without_gradients_is_the_same() -> None:
    q, k, v = torch.randn(3, 2, 4, 65, 32, generator=torch.Generator().manual_seed(0))
    weights = (q @ k.transpose(-2, -1) * 32**-0.5).softmax(-1)
    assert torch.allclose(attend(q, k, v), weights @ v, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(attend(q, k, v), weights @ v, atol=1e-5)
