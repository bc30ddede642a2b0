"""The decoder learns a batch by heart, draws what z_i says, and a row's picture is its own."""

import math
from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from tests.helpers.short_training import learn
from training.diffusion import samplers
from training.diffusion.likelihood import bits_per_dim
from training.diffusion.process import simple_loss, snr_weight, split
from training.models.decoder import Decoder, augmented, count_parameters
from training.models.tokenizer import END, PAD, START
from training.optim.step import Step
from training.sections.clip_section import ClipConfig
from training.sections.decoder_section import DecoderConfig
from training.sections.prior_section import PriorConfig
from training.sections.upsampler_section import UpsamplerConfig

E, VOCABULARY, CONTEXT, SIDE = 16, 40, 10, 8
CONFIG = DecoderConfig(
    image_size_px=SIDE,
    width=16,
    multiples=(1, 2),
    attention_px=(2,),
    text_width=32,
    text_depth=1,
    z_tokens=2,
    T=100,
    sampling_steps=8,
    text_drop=0.5,
    z_drop=0.1,
)


def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return z_i and ids of different texts, and pictures: a bright half on a dark ground, left,
    right, top, ...
    """
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
    model = Decoder(CONFIG, E, VOCABULARY, CONTEXT)
    z_i, ids, pictures = (each.repeat(4, *[1] * (each.ndim - 1)) for each in batch(2))
    losses = learn(
        model, lambda number: model.loss(Step(number, 0, 8, 0, 0, 1), pictures, z_i, ids), 80, 1e-2
    )
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


def projected(pictures: Tensor) -> Tensor:
    """Embed pictures (B, 3, S, S) as unit vectors (B, E) by a fixed random projection: a stand-in
    for CLIP that tells pictures apart.
    """
    projection = torch.randn(3 * SIDE * SIDE, E, generator=torch.Generator().manual_seed(3))
    return F.normalize(pictures.flatten(1) @ projection, dim=1)


def patchwork(count: int, seed: int) -> Tensor:
    """Draw pictures (B, 3, S, S) of four squares, each of a colour of its own."""
    colours = (
        torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed)).round() * 1.6
        - 0.8
    )
    return F.interpolate(colours, size=SIDE)


def test_samples_come_nearer_to_their_z_i_through_training() -> None:
    torch.manual_seed(0)
    model = Decoder(CONFIG.model_copy(update={"guidance": 1.0}), E, VOCABULARY, CONTEXT)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, fused=True)
    unseen, empty = projected(patchwork(24, seed=10_000)), torch.tensor([[START, END]])
    own, of_another = [], []
    for number in range(69):
        if number in (0, 8, 24, 68):
            drawn = projected(model.eval().sample(unseen, empty.expand(24, -1), list(range(24))))
            own.append(float((drawn * unseen).sum(1).mean()))
            of_another.append(float((drawn * unseen.roll(1, 0)).sum(1).mean()))
        pictures = patchwork(32, seed=number)
        loss = model.train().loss(
            Step(number, 0, 32, 0, 0, 1), pictures, projected(pictures), empty.expand(32, -1)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (
        own[0] < 0.2
        and own[-1] > 0.85
        and all(after > before + 0.1 for before, after in pairwise(own))
    ), own
    assert own[-1] > of_another[-1] + 0.5


def untrained() -> Decoder:
    """Return a decoder whose zero-initialised layers are not zero, so that all its inputs reach its
    output.
    """
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
        alone = model.sample(
            z_i[row : row + 1], ids[row : row + 1], [seeds[row]], guidance=guidance
        )
        torch.testing.assert_close(
            alone[0], together[row], atol=3e-3, rtol=0
        )  # rounding, which guidance of an untrained net amplifies
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
    assert (model(x_t, t, model.condition(z_i, changed)) - v).abs().amax(
        (1, 2, 3)
    ).min().item() > 1e-4


def test_conditions_are_dropped_independently_at_the_configured_rates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
            model.loss(
                Step(number, 0, 250, 0, 0, 1),
                pictures.repeat(125, 1, 1, 1),
                z_i.repeat(125, 1),
                ids.repeat(125, 1),
            )
    z, text = torch.cat(drops_z).float(), torch.cat(drops_text).float()
    assert z.mean().item() == pytest.approx(0.1, abs=0.03)
    assert text.mean().item() == pytest.approx(0.5, abs=0.05)
    assert (z * text).mean().item() == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("most", [0.0, 0.5, 1.0])
def test_noise_augmentation_turns_z_i_by_a_level_of_its_own(
    monkeypatch: pytest.MonkeyPatch, most: float
) -> None:
    model, seen, count = untrained(), [], 600
    true = model.condition
    monkeypatch.setattr(
        model, "condition", lambda z_i, *others: (seen.append(z_i), true(z_i, *others))[1]
    )
    monkeypatch.setattr(model, "config", model.config.model_copy(update={"z_noise": most}))
    z_i, ids, pictures = (each.repeat(count // 2, *[1] * (each.ndim - 1)) for each in batch(2))
    with torch.no_grad():
        model.loss(Step(0, 0, count, 0, 0, 1), pictures, z_i, ids)
    told = seen[0]
    if not most:
        assert torch.equal(told, z_i)
        return
    torch.testing.assert_close(told.norm(dim=1), torch.ones(count))
    level = (
        (told * z_i).sum(1).clamp(-1, 1).acos().tan()
    )  # of noise across z_i, about the level that was drawn
    assert float(level.mean()) == pytest.approx(most / 2, rel=0.15)
    assert (
        float(level.quantile(0.1)) < 0.2 * most and float(level.quantile(0.9)) > 0.7 * most
    )  # none is everybody's


def test_augmentation_of_no_level_is_none_and_keeps_any_length() -> None:
    z_i = batch(4)[0] * torch.tensor([[1.0], [2.0], [0.5], [3.0]])
    torch.testing.assert_close(augmented(z_i, torch.zeros(4), torch.randn(4, E)), z_i)
    moved = augmented(z_i, torch.ones(4), torch.randn(4, E))
    torch.testing.assert_close(moved.norm(dim=1), z_i.norm(dim=1))
    assert not torch.allclose(moved, z_i, atol=0.1)


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
    assert all(
        float((a - b).abs().max()) > 1e-3
        for a, b in ((pictures[0], pictures[1]), (pictures[1], pictures[2]))
    )


def test_parameters_are_counted_without_a_model() -> None:
    assert count_parameters(CONFIG, ClipConfig(embed_dim=E), VOCABULARY, CONTEXT) == sum(
        p.numel() for p in untrained().parameters()
    )


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_a_weight_that_needs_one_half_asks_for_one_half(guidance: float) -> None:
    model, z_i, ids = untrained(), *batch(3)[:2]
    sizes: list[int] = []
    model.register_forward_hook(lambda module, given, out: sizes.append(len(given[0])))
    x_t, t = torch.randn(3, 3, SIDE, SIDE), torch.tensor([1, 50, 100])
    x_0 = model.guided_denoise(z_i, ids, guidance)(x_t, t)
    assert sizes == [3]
    near = model.guided_denoise(z_i, ids, guidance + 1e-6)(x_t, t)  # both halves, blended
    torch.testing.assert_close(x_0, near, atol=1e-4, rtol=0)


# Learned variance


def heteroscedastic(count: int, seed: int) -> Tensor:
    """Draw 8-bit pictures of which the left half is known and the right half is noise: their x_0 is
    uncertain in one place only.
    """
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=generator)
    levels[..., : SIDE // 2] = 128
    return levels / 127.5 - 1


@pytest.fixture(scope="module")
def with_variance() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(CONFIG.model_copy(update={"learned_variance": True}), E, VOCABULARY, CONTEXT)
    z_i, ids = (each.repeat(32, 1) for each in batch(1)[:2])
    learn(
        model,
        lambda number: model.loss(
            Step(number, 0, 32, 0, 0, 1), heteroscedastic(32, number), z_i, ids
        ),
        60,
        5e-3,
    )
    return model.eval()


def test_a_learned_variance_is_larger_where_x_0_is_uncertain_and_saves_bits(
    with_variance: Decoder,
) -> None:
    model, x_0 = with_variance, heteroscedastic(16, 10_000)
    z_i, ids = (each.repeat(16, *[1] * (each.ndim - 1)) for each in batch(1)[:2])
    condition, t = model.condition(z_i, ids), torch.full((16,), 30)
    with torch.no_grad():
        _, fraction = model(model.schedule.q_sample(x_0, t, torch.randn_like(x_0)), t, condition)
    assert 0 <= float(fraction.min()) <= float(fraction.max()) <= 1
    known, noisy = fraction[..., : SIDE // 2].mean(), fraction[..., SIDE // 2 :].mean()
    assert float(noisy) > float(known) + 0.1
    learned, small = (
        bits_per_dim(
            [(x_0, model.guided_denoise(z_i, ids, 1.0))], model.schedule, variance, draws=20
        )["bits_per_dim"]
        for variance in ("learned", "small")
    )
    assert learned < 0.9 * small


@pytest.mark.parametrize("sampler", ["dpm_solver", "ddim", "ancestral"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_every_sampler_draws_with_a_learned_variance(
    with_variance: Decoder, sampler: str, guidance: float
) -> None:
    model = Decoder(
        with_variance.config.model_copy(update={"sampler": sampler}), E, VOCABULARY, CONTEXT
    ).eval()
    model.load_state_dict(with_variance.state_dict())
    z_i, ids = (each.repeat(2, *[1] * (each.ndim - 1)) for each in batch(1)[:2])
    both = model.sample(z_i, ids, [1, 2], steps=20, guidance=guidance)
    alone = model.sample(z_i[1:], ids[1:], [2], steps=20, guidance=guidance)
    torch.testing.assert_close(alone[0], both[1], atol=1e-3, rtol=0)
    assert 1.5 * float(both[..., : SIDE // 2].std()) < float(both[..., SIDE // 2 :].std())


def test_samplers_differ_and_ancestral_sampling_takes_the_learned_variance(
    with_variance: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    true = samplers.ancestral

    def spy(
        denoise: object, x_T: Tensor, schedule: object, steps: int, variance: str, **options: object
    ) -> Tensor:
        taken.append(variance)
        return true(denoise, x_T, schedule, steps, variance, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(samplers, "ancestral", spy)
    z_i, ids, _ = batch(1)
    drawn = []
    for model in (with_variance, untrained()):
        for sampler in ("dpm_solver", "ddim", "ancestral"):
            other = Decoder(
                model.config.model_copy(update={"sampler": sampler}), E, VOCABULARY, CONTEXT
            ).eval()
            other.load_state_dict(model.state_dict())
            drawn.append(other.sample(z_i, ids, [3]))
    assert taken == ["learned", "small"]
    assert all(float((a - b).abs().max()) > 1e-2 for a, b in combinations(drawn, 2))


def test_without_a_learned_variance_the_loss_is_the_weighted_simple_one() -> None:
    model, (z_i, ids, pictures) = untrained(), batch(4)
    seen: list[tuple[Tensor, Tensor]] = []
    model.register_forward_hook(lambda module, given, out: seen.append((given[1], out)))
    with torch.no_grad():
        loss = model.loss(Step(0, 0, 4, 0, 0, 1), pictures, z_i, ids)
    ((t, prediction),) = seen
    assert split(prediction)[1] is None
    assert loss == simple_loss(prediction, pictures, snr_weight(model.schedule, t, 5.0, 1.0, "x_0"))


def test_more_sampling_steps_than_diffusion_steps_are_refused() -> None:
    with pytest.raises(ValidationError, match="sampling_steps = 20 but T = 10"):
        DecoderConfig(T=10)
    with pytest.raises(ValidationError, match="sampling_steps = 24 but T = 10"):
        PriorConfig(T=10)
    with pytest.raises(ValidationError, match="sampling_steps = 8 but T = 4"):
        UpsamplerConfig(T=4)


def test_a_floor_above_the_ceiling_is_refused() -> None:
    with pytest.raises(
        ValidationError,
        match="snr_floor = 6 but snr_ceiling = 5: the floor must not be above the ceiling",
    ):
        DecoderConfig(snr_floor=6.0)
    assert DecoderConfig(snr_floor=5.0).snr_ceiling == 5


def test_a_dynamic_threshold_acts_under_guidance_alone() -> None:
    plain = untrained()
    model = Decoder(
        CONFIG.model_copy(update={"dynamic_threshold": 0.9}), E, VOCABULARY, CONTEXT
    ).eval()
    model.load_state_dict(plain.state_dict())
    z_i, ids, _ = batch(2)
    x_t, t = torch.randn(2, 3, SIDE, SIDE), torch.tensor([90, 40])
    clipped, dynamic = (
        split(each.guided_denoise(z_i, ids, 1000.0)(x_t, t))[0].detach() for each in (plain, model)
    )
    assert float(clipped.abs().max()) == float(dynamic.abs().max()) == 1
    assert not torch.allclose(dynamic, clipped, atol=1e-2), (
        "what is not clamped is scaled back as well"
    )
    assert torch.equal(
        *(split(each.guided_denoise(z_i, ids, 1.0)(x_t, t))[0] for each in (plain, model))
    )


def test_a_shifted_schedule_is_trained_and_sampled_with() -> None:
    model = Decoder(CONFIG.model_copy(update={"snr_shift": 0.5}), E, VOCABULARY, CONTEXT)
    torch.testing.assert_close(
        model.schedule.log_snr[1:], untrained().schedule.log_snr[1:] + 2 * math.log(0.5)
    )


def test_every_place_of_the_layout_reaches_the_picture() -> None:
    model = untrained()
    z_i, ids, pictures = batch(4)
    model.loss(Step(0, 0, 4, 0, 0, 1), pictures, z_i, ids).backward()
    assert (
        model.layout is not None
        and model.layout.weight.grad is not None
        and model.places.grad is not None
    )
    side = SIDE // CONFIG.patch_px // 2
    assert bool(model.layout.weight.grad.view(side, side, -1).abs().sum(-1).gt(0).all())
    assert bool(model.places.grad.abs().sum((0, 1)).gt(0).all())


@pytest.mark.parametrize(("power", "mean"), [(1.0, 1 / 2), (2.0, 2 / 3)])
def test_training_times_favour_noisy_steps(
    power: float, mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = (
        Decoder(CONFIG.model_copy(update={"time_power": power}), E, VOCABULARY, CONTEXT),
        [],
    )
    q_sample = model.schedule.q_sample
    monkeypatch.setattr(
        type(model.schedule),
        "q_sample",
        lambda _, x_0, t, eps: (seen.append(t), q_sample(x_0, t, eps))[1],
    )
    z_i, ids, pictures = batch(2)
    with torch.no_grad():
        model.loss(
            Step(0, 0, 2000, 0, 0, 1),
            pictures.repeat(1000, 1, 1, 1),
            z_i.repeat(1000, 1),
            ids.repeat(1000, 1),
        )
    assert int(seen[0].min()) >= 1 and int(seen[0].max()) <= CONFIG.T
    assert abs(float(seen[0].float().mean()) / CONFIG.T - mean) < 0.03


def test_the_layout_can_be_left_out() -> None:
    sizes = [
        sum(
            p.numel()
            for p in Decoder(
                CONFIG.model_copy(update={"layout": on}), E, VOCABULARY, CONTEXT
            ).parameters()
        )
        for on in (True, False)
    ]
    places = (SIDE // CONFIG.patch_px // 2) ** 2 * CONFIG.width * CONFIG.multiples[-1]
    assert sizes[0] - sizes[1] == places * (4 * CONFIG.width + 1)
