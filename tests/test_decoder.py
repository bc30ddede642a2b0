"""The decoder learns a batch by heart, draws what z_i says, and a row's picture is its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.clip import ClipConfig
from training.decoder import Decoder, DecoderConfig, count_parameters
from training.loop import Step
from training.tokenizer import END, PAD, START

E, VOCABULARY, CONTEXT, SIDE = 16, 40, 10, 8
CONFIG = DecoderConfig(
    image_size_px=SIDE, width=16, multiples=(1, 2), attention_px=(2,), text_width=32, text_depth=1, z_tokens=2, T=100, sampling_steps=8,
    text_drop=0.5, z_drop=0.1,
)  # fmt: skip


def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return z_i and ids of different texts, and pictures: a bright half on a dark ground, left, right, top, ..."""
    z_i = F.normalize(torch.randn(count, E, generator=torch.Generator().manual_seed(1)), dim=-1)
    ids = torch.full((count, 5), PAD)
    pictures = torch.full((count, 3, SIDE, SIDE), -0.8)
    for row in range(count):
        words = [3 + row, 20 + row][: 1 + row % 2]
        ids[row, : len(words) + 2] = torch.tensor([START, *words, END])
        half = slice(0, SIDE // 2) if row % 2 else slice(SIDE // 2, SIDE)
        pictures[row, row % 3, :, half] = 0.8
    return z_i, ids, pictures


@pytest.fixture(scope="module")
def learnt() -> tuple[Decoder, list[float]]:
    torch.manual_seed(0)
    model, losses = Decoder(CONFIG, E, VOCABULARY, CONTEXT), []
    z_i, ids, pictures = batch(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for number in range(250):
        loss = model.loss(Step(number, 0, 16, 0, 0, 1), pictures.repeat(8, 1, 1, 1), z_i.repeat(8, 1), ids.repeat(8, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


def test_one_batch_is_learnt_by_heart(learnt: tuple[Decoder, list[float]]) -> None:
    _, losses = learnt
    assert sum(losses[-20:]) < 0.3 * sum(losses[:5]) * 4


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_z_i_decides_what_is_drawn(learnt: tuple[Decoder, list[float]], guidance: float) -> None:
    model, _ = learnt
    z_i, _, pictures = batch(2)
    empty = torch.tensor([[START, END]] * 2)  # no caption can give the answer away
    found = model.sample(z_i, empty, [5, 5], guidance=guidance)
    swapped = model.sample(z_i.flip(0), empty, [5, 5], guidance=guidance)
    assert found.shape == pictures.shape and float(found.abs().max()) <= 1
    for drawn, right in ((found, pictures), (swapped, pictures.flip(0))):
        errors = [(drawn - each).abs().mean((1, 2, 3)) for each in (right, right.flip(0))]
        assert bool((errors[0] < 0.6 * errors[1]).all())


def untrained() -> Decoder:
    """Return a decoder whose zero-initialised layers are not zero, so that all its inputs reach its output."""
    torch.manual_seed(0)
    model = Decoder(CONFIG, E, VOCABULARY, CONTEXT).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and not p.any():
                p.normal_(std=0.1)
    return model


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_picture_depends_on_its_own_row_alone(guidance: float) -> None:
    model = untrained()
    z_i, ids, _ = batch(4)
    seeds = [11, 12, 11, 14]
    together = model.sample(z_i, ids, seeds, guidance=guidance)
    for row in range(4):
        alone = model.sample(z_i[row : row + 1], ids[row : row + 1], [seeds[row]], guidance=guidance)
        torch.testing.assert_close(alone[0], together[row], atol=1e-3, rtol=0)  # rounding, which guidance of an untrained net amplifies
    other = model.sample(z_i[:1], ids[:1], [99], guidance=guidance)
    assert float((other[0] - together[0]).abs().mean()) > 0.01


def test_padding_does_not_change_the_prediction_and_words_do() -> None:
    model = untrained()
    z_i, ids, _ = batch(4)
    x_t, t = torch.randn(4, 3, SIDE, SIDE), torch.tensor([1, 20, 60, 100])
    padded = torch.cat([ids, torch.full((4, CONTEXT - ids.shape[1]), PAD)], 1)
    v = model(x_t, t, model.condition(z_i, ids))
    torch.testing.assert_close(model(x_t, t, model.condition(z_i, padded)), v, atol=1e-5, rtol=0)
    changed = ids.clone()
    changed[:, 1] = 39
    assert (model(x_t, t, model.condition(z_i, changed)) - v).abs().amax((1, 2, 3)).min().item() > 1e-4


def test_conditions_are_dropped_independently_at_the_configured_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    model, drops_z, drops_text = untrained(), [], []
    true = model.condition

    def spy(z_i: Tensor, ids: Tensor, drop_z: Tensor, drop_text: Tensor) -> object:
        drops_z.append(drop_z)
        drops_text.append(drop_text)
        return true(z_i, ids, drop_z, drop_text)

    monkeypatch.setattr(model, "condition", spy)
    z_i, ids, pictures = batch(2)
    with torch.no_grad():
        for number in range(8):
            model.loss(Step(number, 0, 250, 0, 0, 1), pictures.repeat(125, 1, 1, 1), z_i.repeat(125, 1), ids.repeat(125, 1))
    z, text = torch.cat(drops_z).float(), torch.cat(drops_text).float()
    assert z.mean().item() == pytest.approx(0.1, abs=0.03)
    assert text.mean().item() == pytest.approx(0.5, abs=0.05)
    assert (z * text).mean().item() == pytest.approx(0.05, abs=0.02)


def test_a_dropped_condition_leaves_nothing_behind() -> None:
    model = untrained()
    z_i, ids, _ = batch(3)
    yes, no = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    both = model.condition(z_i, ids, yes, yes)
    for part in (both.added, both.context * both.is_key[..., None]):
        torch.testing.assert_close(part[1:], part[:1].expand_as(part[1:]))
    plain, kept = model.condition(z_i, ids), model.condition(z_i, ids, no, no)
    assert plain.added.equal(kept.added) and plain.context.equal(kept.context)
    for drop in ((yes, no), (no, yes)):
        assert not model.condition(z_i, ids, *drop).added.allclose(plain.added)


def test_guidance_moves_away_from_the_unconditional_prediction() -> None:
    model = untrained()
    z_i, ids, _ = batch(2)
    pictures = [model.sample(z_i, ids, [1, 2], guidance=w) for w in (0.0, 1.0, 3.0)]
    unconditional = model.sample(z_i.flip(0), ids.flip(0), [1, 2], guidance=0.0)
    torch.testing.assert_close(pictures[0], unconditional, atol=1e-4, rtol=0)
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in ((pictures[0], pictures[1]), (pictures[1], pictures[2])))


def test_parameters_are_counted_without_a_model() -> None:
    assert count_parameters(CONFIG, ClipConfig(embed_dim=E), VOCABULARY, CONTEXT) == sum(p.numel() for p in untrained().parameters())
