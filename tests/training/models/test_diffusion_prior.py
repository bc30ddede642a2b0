"""The prior learns a batch by heart, listens to its caption, and a row's sample is its own."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.small_systems import write_embeddings, write_system
from tests.helpers.stage_folders import training_folders
from training.jobs.train import fit_prior, write_model
from training.models.diffusion_prior import DROP, Prior
from training.models.priors import count_parameters, load
from training.models.tokenizer import END, PAD, START
from training.optim.step import Step
from training.sections.clip_section import ClipConfig
from training.sections.prior_section import PriorConfig

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


def test_samples_are_unit_vectors_near_what_the_text_was_trained_with(
    learnt: tuple[Prior, list[float]],
) -> None:
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
    candidates = torch.stack(
        [
            model.sample(z_t, ids, [seed * 4 + place for seed in range(3)], best_of=1)
            for place in range(4)
        ],
        1,
    )
    scores = (candidates * z_t[:, None]).sum(-1)
    torch.testing.assert_close((best * z_t).sum(-1), scores.max(1).values, atol=1e-5, rtol=0)
    assert float((scores.max(1).values - scores.min(1).values).min()) > 1e-3


def test_padding_does_not_change_the_prediction() -> None:
    model = untrained()
    _, z_t, ids = batch(4)
    x_t, t = torch.randn(4, E), torch.tensor([1, 20, 60, 100])
    padded = torch.cat([ids, torch.full((4, CONTEXT - ids.shape[1]), PAD)], 1)
    torch.testing.assert_close(
        model(x_t, t, z_t, padded), model(x_t, t, z_t, ids), atol=1e-5, rtol=0
    )
    changed = ids.clone()
    changed[:, 1] = 39
    assert (model(x_t, t, z_t, changed) - model(x_t, t, z_t, ids)).abs().max().item() > 1e-4


def test_conditions_are_dropped_at_the_configured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = untrained(), []
    true = model.with_drops
    monkeypatch.setattr(
        model,
        "with_drops",
        lambda z_t, ids, dropped: (seen.append(dropped), true(z_t, ids, dropped))[1],
    )
    z_i, z_t, ids = (x.repeat(100, 1) for x in batch(5))
    with torch.no_grad():
        for number in range(4):
            model.loss(Step(number, 0, 500, 0, 0, 1), z_i, z_t, ids)
    rate = torch.cat(seen).float().mean().item()
    assert rate == pytest.approx(CONFIG.text_drop, abs=0.03)
    assert not seen[0].equal(seen[1]) and seen[0].equal(
        Step(0, 0, 500, 0, 0, 1).uniform(DROP) < 0.1
    )


def test_a_dropped_row_keeps_nothing_of_its_text() -> None:
    model = untrained()
    model.null_text.data.fill_(0.5)
    _, z_t, ids = batch(4)
    found, text = model.with_drops(z_t, ids, torch.tensor([True, False, True, True]))
    for row in (0, 2, 3):
        assert found[row].equal(model.null_text) and text[row].tolist() == [START, END] + [PAD] * (
            ids.shape[1] - 2
        )
    torch.testing.assert_close(found[1], z_t[1] * E**0.5)
    assert text[1].equal(ids[1])


def test_the_analytic_variance_is_the_priors_own_error() -> None:
    z_i, z_t, ids = batch(19)
    model = Prior(CONFIG.model_copy(update={"sampler": "analytic"}), E, VOCABULARY, CONTEXT).eval()
    model.load_state_dict({"x_0_error": model.x_0_error, **untrained().state_dict()})
    # without errors nothing is added to the posterior's variance, which is DDIM's with eta = 1
    torch.testing.assert_close(
        model.sample(z_t, ids, list(range(19))),
        untrained().sample(z_t, ids, list(range(19))),
        atol=1e-4,
        rtol=0,
    )
    model.measure(z_i, z_t, ids)
    table = model.x_0_error
    for t in (1, CONFIG.T):
        eps = torch.randn(19, E, generator=torch.Generator().manual_seed(t))
        x_t, times = (
            model.schedule.q_sample(z_i * model.scale, torch.full((19,), t), eps),
            torch.full((19,), t),
        )
        with torch.no_grad():
            error = (model(x_t, times, z_t * model.scale, ids) - z_i * model.scale).square().mean()
        assert float(table[t]) == pytest.approx(float(error), rel=0.2)
    assert table[0] == 0 and table.shape == (CONFIG.T + 1,)
    moved = (
        model.sample(z_t, ids, list(range(19))) - untrained().sample(z_t, ids, list(range(19)))
    ).norm(dim=1)
    assert float(moved.min()) > 0.05


def test_a_trained_prior_has_measured_its_errors_and_is_read_with_them(tmp_path: Path) -> None:
    folder = write_system(tmp_path)
    write_embeddings(folder / "embed")
    config = PriorConfig(
        width=32,
        depth=1,
        T=50,
        sampling_steps=4,
        images=64,
        batch_size=32,
        precision="float32",
        sampler="analytic",
    )
    (tmp_path / "work").mkdir()
    shutil.copy(folder / "clip" / "tokenizer.json", tmp_path / "work")
    folders = training_folders(folder, tmp_path / "work", "clip", "embed")
    model, averaged = fit_prior(config, folders, "cpu")
    assert averaged["x_0_error"][0] == 0 and bool((averaged["x_0_error"][1:] > 0).all())
    write_model("prior", model, averaged, config, tmp_path / "work")
    read = load(tmp_path / "work")
    assert isinstance(read, Prior) and torch.equal(read.x_0_error, averaged["x_0_error"])


def test_parameters_are_counted_without_a_model() -> None:
    assert count_parameters(CONFIG, ClipConfig(embed_dim=E), VOCABULARY, CONTEXT) == sum(
        p.numel() for p in untrained().parameters()
    )
