"""The prior learns a batch by heart, listens to its caption, and a row's sample is its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.clip import ClipConfig
from training.loop import Step
from training.prior import DROP, Prior, PriorConfig
from training.priors import count_parameters
from training.tokenizer import END, PAD, START

E, VOCABULARY, CONTEXT = 16, 40, 10
CONFIG = PriorConfig(width=32, depth=1, T=100, text_drop=0.1, sampling_steps=8, best_of=2)


def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return z_i, z_t and ids of different texts."""
    draw = torch.Generator().manual_seed(1)
    z_i, z_t = (F.normalize(torch.randn(count, E, generator=draw), dim=-1) for _ in range(2))
    ids = torch.full((count, 6), PAD)
    for row in range(count):
        words = [3 + row, 20 + row][: 1 + row % 2]
        ids[row, : len(words) + 2] = torch.tensor([START, *words, END])
    return z_i, z_t, ids


def fitted(config: PriorConfig, steps: int, count: int = 2) -> tuple[Prior, list[float]]:
    torch.manual_seed(0)
    model, losses = Prior(config, E, VOCABULARY, CONTEXT), []
    z_i, z_t, ids = (x.repeat(16, 1) for x in batch(count))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for number in range(steps):
        loss = model.loss(Step(number, 0, len(z_i), 0, 0, 1), z_i, z_t, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.fixture(scope="module")
def learnt() -> tuple[Prior, list[float]]:
    return fitted(CONFIG, 200)


def test_one_batch_is_learnt_by_heart(learnt: tuple[Prior, list[float]]) -> None:
    _, losses = learnt
    assert losses[0] > 0.8 and sum(losses[-20:]) / 20 < 0.2


def test_samples_are_unit_vectors_near_what_the_text_was_trained_with(learnt: tuple[Prior, list[float]]) -> None:
    model, _ = learnt
    z_i, z_t, ids = batch(2)
    found = model.sample(z_t, ids, [0, 1])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    similarity = found @ z_i.T
    assert float(similarity.diagonal().min()) > 0.9
    swapped = model.sample(z_t.flip(0), ids.flip(0), [0, 1])
    assert (swapped @ z_i.T).argmax(1).tolist() == [1, 0]


def untrained() -> Prior:
    torch.manual_seed(0)
    return Prior(CONFIG, E, VOCABULARY, CONTEXT).eval()


def test_a_sample_depends_on_its_own_seed_and_text_alone() -> None:
    model = untrained()
    _, z_t, ids = batch(5)
    seeds = [11, 12, 13, 11, 15]
    together = model.sample(z_t, ids, seeds)
    for row in range(5):
        alone = model.sample(z_t[row : row + 1], ids[row : row + 1], [seeds[row]])
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)
    other = model.sample(z_t[:1], ids[:1], [99])
    assert float((other[0] - together[0]).norm()) > 0.05


def test_best_of_keeps_the_candidate_nearest_to_the_text() -> None:
    model = untrained()
    _, z_t, ids = batch(3)
    best = model.sample(z_t, ids, [0, 1, 2], best_of=4)
    candidates = torch.stack([model.sample(z_t, ids, [seed * 4 + place for seed in range(3)], best_of=1) for place in range(4)], 1)
    scores = (candidates * z_t[:, None]).sum(-1)
    torch.testing.assert_close((best * z_t).sum(-1), scores.max(1).values, atol=1e-5, rtol=0)
    assert float((scores.max(1).values - scores.min(1).values).min()) > 1e-3


def test_padding_does_not_change_the_prediction() -> None:
    model = untrained()
    _, z_t, ids = batch(4)
    x_t, t = torch.randn(4, E), torch.tensor([1, 20, 60, 100])
    padded = torch.cat([ids, torch.full((4, CONTEXT - ids.shape[1]), PAD)], 1)
    torch.testing.assert_close(model(x_t, t, z_t, padded), model(x_t, t, z_t, ids), atol=1e-5, rtol=0)
    changed = ids.clone()
    changed[:, 1] = 39
    assert (model(x_t, t, z_t, changed) - model(x_t, t, z_t, ids)).abs().max().item() > 1e-4


def test_conditions_are_dropped_at_the_configured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = untrained(), []
    true = model.with_drops
    monkeypatch.setattr(model, "with_drops", lambda z_t, ids, dropped: (seen.append(dropped), true(z_t, ids, dropped))[1])
    z_i, z_t, ids = (x.repeat(100, 1) for x in batch(5))
    with torch.no_grad():
        for number in range(4):
            model.loss(Step(number, 0, 500, 0, 0, 1), z_i, z_t, ids)
    rate = torch.cat(seen).float().mean().item()
    assert rate == pytest.approx(CONFIG.text_drop, abs=0.03)
    assert not seen[0].equal(seen[1]) and seen[0].equal(Step(0, 0, 500, 0, 0, 1).uniform(DROP) < 0.1)


def test_a_dropped_row_keeps_nothing_of_its_text() -> None:
    model = untrained()
    model.null_text.data.fill_(0.5)
    _, z_t, ids = batch(4)
    found, text = model.with_drops(z_t, ids, torch.tensor([True, False, True, True]))
    for row in (0, 2, 3):
        assert found[row].equal(model.null_text) and text[row].tolist() == [START, END] + [PAD] * (ids.shape[1] - 2)
    torch.testing.assert_close(found[1], z_t[1] * E**0.5)
    assert text[1].equal(ids[1])


def test_parameters_are_counted_without_a_model() -> None:
    assert count_parameters(CONFIG, ClipConfig(embed_dim=E), VOCABULARY, CONTEXT) == sum(p.numel() for p in untrained().parameters())
