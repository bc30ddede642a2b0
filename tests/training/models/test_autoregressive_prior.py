"""The autoregressive prior learns a batch by heart, its cache changes nothing, and each bucket
knows only those before it.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flows.config.run_config import find_disagreement
from tests.training.models.test_diffusion_prior import CONTEXT, VOCABULARY, E, batch
from training.jobs.train import write_model
from training.models import priors
from training.models.autoregressive_prior import AutoregressivePrior
from training.models.diffusion_prior import Prior
from training.models.tokenizer import PAD, Tokenizer
from training.optim.step import Step
from training.sections.prior_section import PriorConfig
from training.sections.tokenizer_section import TokenizerConfig

K, V = 6, 32
CONFIG = PriorConfig(
    kind="autoregressive", width=32, depth=2, pca_dims=K, buckets=V, text_drop=0.1, best_of=2
)


def spread(count: int = 400) -> tuple[Tensor, Tensor]:
    """Return unit vectors z_i, most of them along few directions, and z_t near them."""
    draw = torch.Generator().manual_seed(2)
    z_i = F.normalize(
        torch.randn(count, E, generator=draw) * torch.linspace(2, 0.02, E) ** 2 + 0.1, dim=-1
    )
    return z_i, F.normalize(z_i + 0.1 * torch.randn(count, E, generator=draw), dim=-1)


def untrained(config: PriorConfig = CONFIG) -> AutoregressivePrior:
    """Return a prior fitted to `spread`, whose logits are not all alike."""
    torch.manual_seed(0)
    model = AutoregressivePrior(config, E, VOCABULARY, CONTEXT).eval()
    model.fit_to(*spread())
    with torch.no_grad():
        for table in (model.tokens, model.values, model.positions, model.out.weight):
            (table.weight if isinstance(table, torch.nn.Embedding) else table).normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def learnt() -> tuple[AutoregressivePrior, list[float], Tensor]:
    torch.manual_seed(0)
    model, losses = AutoregressivePrior(CONFIG, E, VOCABULARY, CONTEXT), []
    z_i, z_t = spread()
    model.fit_to(z_i, z_t)
    z_i, z_t, ids = z_i[[3, 11]], z_t[[3, 11]], batch(2)[2]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for number in range(120):
        loss = model.loss(
            Step(number, 0, 32, 0, 0, 1), z_i.repeat(16, 1), z_t.repeat(16, 1), ids.repeat(16, 1)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses, torch.stack([z_i, z_t])


def test_one_batch_is_learnt_by_heart(
    learnt: tuple[AutoregressivePrior, list[float], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, losses, (z_i, z_t) = learnt
    monkeypatch.setattr(
        model, "config", CONFIG.model_copy(update={"temperature": 0.2})
    )  # what it finds likeliest, whatever the seed
    assert losses[0] > 3 and sum(losses[-20:]) / 20 < 0.3
    ids = batch(2)[2]
    found = model.sample(z_t, ids, [0, 1])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    rounded = model.from_buckets(model.to_buckets(z_i, z_t))
    torch.testing.assert_close(found, rounded, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        model.sample(z_t.flip(0), ids.flip(0), [0, 1]), rounded.flip(0), atol=1e-5, rtol=0
    )


def test_a_bucket_is_no_further_from_its_value_than_half_its_width() -> None:
    model = untrained()
    z_i, z_t = spread()
    buckets = model.to_buckets(z_i, z_t)
    assert buckets.shape == (400, K + 1) and int(buckets.min()) >= 0 and int(buckets.max()) < V
    assert bool((buckets.amax(0) - buckets.amin(0) == V - 1).all())  # all of them are in use
    values = torch.cat(
        [(z_i * z_t).sum(1, keepdim=True), (z_i - model.mean) @ model.components.T], 1
    )
    width = (model.high - model.low) / V
    middle = model.low + (buckets + 0.5) * width
    assert bool(((values - middle).abs() <= width / 2 * 1.001).all())
    kept = F.normalize(values[:, 1:] @ model.components + model.mean, dim=-1)
    assert float((model.from_buckets(buckets) * kept).sum(1).min()) > 0.99
    assert float((kept * z_i).sum(1).mean()) > 0.93  # K components hold nearly all


def test_bfloat16_does_not_move_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    model = untrained()
    z_i, z_t = spread()
    seen = []
    monkeypatch.setattr(
        model,
        "to_buckets",
        lambda *a: seen.append(AutoregressivePrior.to_buckets(model, *a)) or seen[-1],
    )
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(Step(0, 0, 400, 0, 0, 1), z_i, z_t, batch(1)[2].repeat(400, 1))
    assert seen[0].equal(AutoregressivePrior.to_buckets(model, z_i, z_t))


def test_the_cache_draws_what_the_whole_sequence_says() -> None:
    model = untrained()
    _, z_t = spread(4)
    ids = batch(4)[2]
    chance = torch.rand(4, K + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    drawn = model.draw(z_t * 4, ids, chance)
    cumulated = model(drawn, z_t * 4, ids).double().softmax(-1).cumsum(-1)
    again = torch.searchsorted(cumulated, chance[..., None], right=True)[..., 0]
    assert again.equal(drawn) and len(set(drawn.flatten().tolist())) > 5


def test_a_bucket_knows_only_those_before_it() -> None:
    model = untrained()
    z_i, z_t = spread(2)
    ids, buckets = batch(2)[2], model.to_buckets(z_i, z_t)
    logits = model(buckets, z_t, ids)
    for place in range(K):
        changed = buckets.clone()
        changed[:, place] = (changed[:, place] + 7) % V
        moved = (model(changed, z_t, ids) - logits).abs().amax((0, 2))
        assert bool((moved[: place + 1] < 1e-5).all()) and bool((moved[place + 1 :] > 1e-3).all())


def test_the_dot_product_comes_from_the_upper_half(monkeypatch: pytest.MonkeyPatch) -> None:
    model = untrained(CONFIG.model_copy(update={"best_of": 1}))
    _, z_t = spread(1)
    ids = batch(1)[2]
    drawn: list[Tensor] = []
    monkeypatch.setattr(
        model, "draw", lambda *a: drawn.append(AutoregressivePrior.draw(model, *a)) or drawn[-1]
    )
    model.sample(z_t.expand(300, -1), ids.expand(300, -1), list(range(300)))
    shares = model(drawn[0][:1], z_t * model.text_scale, ids)[0, 0].softmax(-1)
    median = int((shares.cumsum(0) < 0.5).sum())
    assert int(drawn[0][:, 0].min()) >= median and len(set(drawn[0][:, 0].tolist())) > 1
    first = (
        model(drawn[0], z_t.expand(300, -1) * model.text_scale, ids.expand(300, -1))[:, 1]
        .softmax(-1)
        .cumsum(-1)
    )
    below = first.gather(1, drawn[0][:, 1:2]) < 0.5
    assert (
        0.05 < float(below.float().mean()) < 0.7
    )  # a coordinate comes from all of its distribution


def test_a_sample_depends_on_its_own_row_alone_and_padding_is_nothing() -> None:
    model = untrained()
    _, z_t = spread(4)
    ids = batch(4)[2]
    together = model.sample(z_t, ids, [5, 6, 5, 8])
    padded = F.pad(ids, (0, CONTEXT - ids.shape[1]), value=PAD)
    torch.testing.assert_close(model.sample(z_t, padded, [5, 6, 5, 8]), together, atol=1e-5, rtol=0)
    for row, seed in enumerate((5, 6, 5, 8)):
        torch.testing.assert_close(
            model.sample(z_t[row : row + 1], ids[row : row + 1], [seed])[0],
            together[row],
            atol=1e-5,
            rtol=0,
        )
    assert not model.sample(z_t[:1], ids[:1], [9])[0].allclose(together[0], atol=1e-2)


def test_the_best_of_several_has_the_largest_dot_product() -> None:
    model = untrained()
    _, z_t = spread(1)
    ids = batch(1)[2]
    best = model.sample(z_t, ids, [1], best_of=6)
    each = torch.cat([model.sample(z_t, ids, [6 + place], best_of=1) for place in range(6)])
    torch.testing.assert_close(best[0], each[(each @ z_t[0]).argmax()])


def test_a_dropped_text_leaves_nothing_behind() -> None:
    model = untrained()
    z_i, z_t = spread(3)
    ids, yes = batch(3)[2], torch.ones(3, dtype=torch.bool)
    text, words = model.with_drops(z_t, ids, yes)
    logits = model(model.to_buckets(z_i[:1], z_t[:1]).expand(3, -1), text, words)
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))


@pytest.mark.parametrize(
    "config", [CONFIG, PriorConfig(width=32, depth=1, T=20, sampling_steps=4, variance=0.29)]
)
def test_a_written_prior_is_read_as_what_it_was(config: PriorConfig, tmp_path: Path) -> None:
    tokenizer = Tokenizer.fit(["a b"], TokenizerConfig(vocab_size=270, context=CONTEXT))
    tokenizer.save(tmp_path / "tokenizer.json")
    torch.manual_seed(0)
    model = priors.make(config, E, tokenizer.vocab_size, CONTEXT)
    model.fit_to(*spread())
    write_model("prior", model, model.state_dict(), config, tmp_path)
    found = priors.load(tmp_path)
    assert type(found) is type(model) and not found.training
    assert all(found.state_dict()[name].equal(value) for name, value in model.state_dict().items())


def test_the_embedding_scale_comes_from_the_data() -> None:
    z_i, z_t = spread()
    scaled, plain = (
        Prior(
            PriorConfig(width=32, depth=1, T=20, sampling_steps=4, variance=variance),
            E,
            VOCABULARY,
            CONTEXT,
        )
        for variance in (0.29, None)
    )
    for model in (scaled, plain):
        model.fit_to(z_i, z_t)
    assert float((z_i * scaled.scale).var(0, correction=0).mean()) == pytest.approx(0.29, rel=1e-4)
    assert float(plain.scale) == pytest.approx(E**0.5)


def test_more_components_than_there_are_is_a_mistake_of_the_recipe() -> None:
    from flows.config.run_config import load_recipe

    config = load_recipe("quickstart", ["prior.kind=autoregressive"])
    assert find_disagreement(config) == ""
    small = config.model_copy(update={"clip": config.clip.model_copy(update={"embed_dim": 24})})
    assert (
        find_disagreement(small)
        == "[prior] pca_dims = 32 but [clip] embed_dim = 24: there are no more components than that"
    )
    with pytest.raises(ValueError, match="embeddings have 4 dimensions"):
        AutoregressivePrior(CONFIG, 4, VOCABULARY, CONTEXT)
