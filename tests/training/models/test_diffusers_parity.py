"""What diffusers' classes are trained on beside ours is what their pipeline draws with: a
comparison with them is fair.
"""

from statistics import median

import pytest
import torch

from tests.helpers.diffusers_models import (
    Decoder,
    DecoderLoss,
    Diffusers,
    PriorLoss,
    dropped,
    make_prior,
    schedule_of,
    walk,
)
from tests.peers.timed_training import Trained, count, nearest, train
from training.diffusion.process import Schedule

E, N, SIDE_PX = 16, 6, 8
EMPTY = {
    "z_t": torch.zeros(1, E),
    "encodings": torch.zeros(1, N, E),
    "is_word": torch.arange(N)[None] < 2,
}


def texts(count: int) -> dict[str, torch.Tensor]:
    return {
        "z_t": torch.randn(count, E),
        "encodings": torch.randn(count, N, E),
        "is_word": torch.arange(N).expand(count, -1) < 4,
    }


@pytest.fixture
def theirs() -> Diffusers:
    torch.manual_seed(0)
    return Diffusers(make_prior(E, N, 1, 1), Decoder(E, SIDE_PX, (16, 32), 1, 16, 8))


def test_their_schedule_is_the_cosine_and_their_steps_end_at_what_is_predicted(
    theirs: Diffusers,
) -> None:
    assert torch.allclose(
        schedule_of(theirs.scheduler).alpha_bar, Schedule.cosine(1000).alpha_bar, atol=1e-6
    )
    x_0 = torch.rand(3, E)
    assert torch.allclose(
        walk(theirs.prior_scheduler, 5, torch.randn(3, E), lambda x_t, t: x_0), x_0, atol=2e-3
    )


def test_a_prior_that_knows_two_pairs_draws_the_z_i_of_each(theirs: Diffusers) -> None:
    z_i, known = 3 + 2 * torch.randn(2, E), texts(2)
    loss = PriorLoss(theirs.prior, theirs.prior_scheduler, z_i, EMPTY, text_drop=0.1)
    trained = Trained(loss, 3e-3, 0.0, 1.0)
    many = {name: each.repeat(16, *[1] * (each.ndim - 1)) for name, each in known.items()}
    for _ in range(200):
        trained.step(False, z_i=z_i.repeat(16, 1), **many)
    found = []
    theirs.decoder.text.forward = lambda image_embeddings, **rest: (
        found.append(image_embeddings) or (torch.zeros(4, N + 4, E), None)
    )  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(ValueError):  # all that is wanted of the decoder is what it is told
        loss.eval()
        theirs(
            *(torch.cat([EMPTY[name].expand_as(each), each]) for name, each in known.items()),
            guidance=(1.0, 1.0),
            seeds=[0, 1],
        )
    assert (found[0] - z_i).norm() < 0.2 * (z_i - z_i.mean(0)).norm()


def test_a_decoder_learns_pictures_and_their_variance(theirs: Diffusers) -> None:
    pictures = torch.rand(16, 3, 1, 1).expand(16, 3, SIDE_PX, SIDE_PX) * 2 - 1
    z_i, known = torch.randn(16, E), texts(16)
    trained = Trained(
        DecoderLoss(theirs.decoder, theirs.scheduler, EMPTY, z_drop=0.1, text_drop=0.5),
        3e-3,
        0.0,
        1.0,
    )
    variance = theirs.decoder.unet.conv_out.bias[3:].clone()
    losses = [trained.step(False, x_0=pictures, z_i=z_i, **known) for _ in range(60)]
    assert median(losses[-20:]) < 0.3 * median(losses[:5])
    assert (theirs.decoder.unet.conv_out.bias[3:] - variance).abs().min() > 1e-3


def test_a_training_keeps_to_its_time_and_returns_averaged_weights() -> None:
    class Squares(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((1,), 4.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (
                (self.weight - x).square().mean()
            )  # the best weight is the batch's own, so that none stays

    model = Squares()
    averaged, facts = train(
        model,
        lambda rows: {"x": 1.0 + rows.float() / 64},
        8,
        seconds=1.0,
        batch=4,
        learning_rate=0.1,
        bf16=False,
    )
    assert 0 < facts["seconds"] < 3 and facts["images_seen"] % 4 == 0 and facts["parameters"] == 1
    assert facts["loss"] < 0.01 * facts["first_loss"]
    assert averaged.weight != model.weight and averaged.weight.item() == pytest.approx(
        1.05, abs=0.5
    )


def test_a_picture_depends_on_its_own_text_seed_and_guidance_alone(theirs: Diffusers) -> None:
    theirs.prior.clip_std.data.fill_(1.0)
    known = texts(2)

    def drawn(rows: list[int], guidance: tuple[float, float] = (4.0, 8.0)) -> torch.Tensor:
        both = {
            name: torch.cat([EMPTY[name].expand_as(each[rows]), each[rows]])
            for name, each in known.items()
        }
        return theirs(**both, guidance=guidance, seeds=rows)

    assert torch.allclose(drawn([0, 1])[1:], drawn([1]), atol=1e-4)
    assert not torch.allclose(drawn([1]), drawn([1], (1.0, 1.0)), atol=1e-2)


def test_dropped_texts_are_the_empty_one() -> None:
    known = texts(2)
    found = dropped(known, EMPTY, torch.tensor([True, False]))
    for name, each in found.items():
        assert torch.equal(each[0], EMPTY[name][0]) and torch.equal(each[1], known[name][1])


def test_the_nearest_number_of_parameters_is_chosen() -> None:
    sizes = {depth: count(make_prior(E, N, 1, depth)) for depth in (1, 2, 3)}
    assert (
        count(nearest(lambda depth: make_prior(E, N, 1, depth), range(1, 4), sizes[2] + 10))
        == sizes[2]
    )
