"""The decoder's figures on held-out pictures: who is judged, what it is told, and that bits and
PSNR are what they say.
"""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from infra.errors import DataError
from tests.helpers.evaluation_run import direction, draw, row, usual_rows, write_run
from tests.helpers.short_training import learn
from tests.helpers.stage_folders import shards_in
from training.diffusion.calibration import calibrate
from training.diffusion.likelihood import bits_per_dim
from training.diffusion.variance import measure_x_0_error
from training.generation import reconstruction
from training.generation.reconstruction import Described, inversion, likelihood, read
from training.models.decoder import Decoder
from training.models.tokenizer import PAD, Tokenizer
from training.optim.step import Step
from training.sections.decoder_section import DecoderConfig
from training.sections.tokenizer_section import TokenizerConfig

E, SIDE = 16, 8
CONFIG = DecoderConfig(
    image_size_px=SIDE,
    width=16,
    multiples=(1, 2),
    attention_px=(2,),
    text_width=32,
    text_depth=1,
    T=50,
    sampling_steps=8,
    z_drop=0.2,
    parametrisation="v",
    time_power=1,
)
TOKENIZER = Tokenizer.fit(["colour 1", "a colour 12"], TokenizerConfig(vocab_size=270, context=32))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, usual_rows())
    return folder


def judged(
    run: Path, split: str = "held_out_concept", at_most: int = 100, seed: int = 0
) -> Described:
    return read(run / "embed", shards_in(run), split, TOKENIZER, SIDE, at_most, seed)


@pytest.fixture(scope="module")
def decoder(run: Path) -> Decoder:
    """A decoder that has begun to learn the training pictures."""
    torch.manual_seed(0)
    model, train = Decoder(CONFIG, E, TOKENIZER.vocab_size, TOKENIZER.context), judged(run, "train")

    def loss(number: int) -> torch.Tensor:
        rows = torch.randint(len(train), (32,), generator=torch.Generator().manual_seed(number))
        return model.loss(
            Step(number, 0, 32, 0, 0, 1), train.x_0[rows], train.z_i[rows], train.ids[rows]
        )

    learn(model, loss, 90, 1e-2)
    return model.eval().requires_grad_(False)


# Who is judged


def test_one_picture_of_each_concept_is_judged_and_it_is_its_own(run: Path) -> None:
    found = judged(run)
    assert sorted(found.captions) == [f"colour {number}" for number in range(12, 16)]
    assert found.x_0.shape == (4, 3, SIDE, SIDE) and len(set(found.keys)) == 4
    for x_0, z_i, ids, caption in zip(found.x_0, found.z_i, found.ids, found.captions, strict=True):
        number = int(caption.split()[-1])
        middle = torch.tensor(draw(number, "plain")[10, 10]) / 127.5 - 1
        torch.testing.assert_close(x_0[:, SIDE // 2, SIDE // 2], middle.float(), atol=1e-6, rtol=0)
        torch.testing.assert_close(z_i, torch.from_numpy(direction(number)), atol=1e-3, rtol=0)
        assert [each for each in ids.tolist() if each != PAD] == TOKENIZER([caption])[0].tolist()


def test_the_seed_draws_who_is_judged(run: Path) -> None:
    assert judged(run, seed=1).keys == judged(run, seed=1).keys
    assert len({tuple(judged(run, at_most=2, seed=seed).keys) for seed in range(8)}) > 3
    assert len(judged(run, at_most=2)) == 2 and len(judged(run, "held_out_style")) == 16
    first = judged(run).first(3)
    assert (len(first), first.keys) == (3, judged(run).keys[:3])
    left, right = first.halves()
    assert (left.keys, right.keys) == (first.keys[:1], first.keys[1:2]) and torch.equal(
        right.x_0, first.x_0[1:2]
    )


def test_pairs_without_a_concept_are_each_their_own(tmp_path: Path) -> None:
    write_run(
        tmp_path, [row(number, "plain", "held_out_concept", concept="") for number in (1, 2, 3)]
    )
    assert len(judged(tmp_path)) == 3 and len(judged(tmp_path, "train")) == 0


# Likelihood


def test_bits_are_those_of_the_bound_with_the_analytic_variance(
    run: Path, decoder: Decoder
) -> None:
    pictures, train = judged(run, "held_out_style"), judged(run, "train")
    found = likelihood(decoder, pictures, train, draws=6, seed=3)
    assert (found["variance"], found["calibrated_on"], found["draws"], found["T"]) == (
        "analytic",
        12,
        6,
        50,
    )
    for told, w in (("told_all", 1.0), ("told_nothing", 0.0)):
        own = reconstruction.generators(range(3, 3 + len(train)), reconstruction.Stream.DATA)
        denoise, schedule = decoder.guided_denoise(train.z_i, train.ids, w), decoder.schedule
        calibration = calibrate(denoise, train.x_0, schedule, reconstruction.POINTS, own)
        error = measure_x_0_error(
            calibration(denoise), train.x_0, schedule, reconstruction.POINTS, own
        )
        batch = [(pictures.x_0, calibration(decoder.guided_denoise(pictures.z_i, pictures.ids, w)))]
        assert found[told] == pytest.approx(
            bits_per_dim(batch, decoder.schedule, "analytic", error, 6, seed=3), rel=1e-6
        )
        assert found[told]["samples"] == 16 and found[told]["standard_error"] > 0


def test_what_the_decoder_is_told_saves_bits(run: Path, decoder: Decoder) -> None:
    train = judged(run, "train")
    found = likelihood(decoder, train, train, draws=10, seed=0)
    assert found["told_all"]["bits_per_dim"] < found["told_nothing"]["bits_per_dim"] - 0.1


def test_bits_do_not_depend_on_the_batches(
    run: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, train = judged(run, "held_out_style"), judged(run, "train")
    whole = likelihood(decoder, pictures, train, draws=3, seed=0)
    monkeypatch.setattr(reconstruction, "BATCH", 5)
    assert likelihood(decoder, pictures, train, draws=3, seed=0)["told_all"] == pytest.approx(
        whole["told_all"], rel=1e-4
    )


def test_a_learned_variance_is_taken_as_it_is(run: Path) -> None:
    torch.manual_seed(0)
    model = Decoder(
        CONFIG.model_copy(update={"learned_variance": True}),
        E,
        TOKENIZER.vocab_size,
        TOKENIZER.context,
    ).eval()
    pictures, train = judged(run), judged(run, "train")
    found = likelihood(model, pictures, train, draws=4, seed=0)
    own = reconstruction.generators(range(len(train)), reconstruction.Stream.DATA)
    calibration = calibrate(
        model.guided_denoise(train.z_i, train.ids, 1.0),
        train.x_0,
        model.schedule,
        reconstruction.POINTS,
        own,
    )
    batch = [(pictures.x_0, calibration(model.guided_denoise(pictures.z_i, pictures.ids, 1.0)))]
    assert (found["variance"], found["calibrated_on"]) == ("learned", 12)
    assert found["told_all"] == pytest.approx(
        bits_per_dim(batch, model.schedule, "learned", draws=4), rel=1e-6
    )


def test_the_bits_of_png_are_those_of_its_files(run: Path, decoder: Decoder) -> None:
    pictures = judged(run)
    noise = replace(
        pictures,
        x_0=torch.randint(0, 256, pictures.x_0.shape, generator=torch.Generator().manual_seed(0))
        / 127.5
        - 1,
    )
    plain, noisy = (
        likelihood(decoder, each, pictures, draws=2, seed=0)["png_bits_per_dim"]
        for each in (pictures, noise)
    )
    assert noisy > 8  # noise does not compress, and a file has a header
    assert plain < 0.8 * noisy
    image = ((noise.x_0[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    theirs = 8 * len(cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1]) / image.size
    assert noisy == pytest.approx(theirs, rel=0.1)


def test_one_picture_has_no_standard_error_and_none_no_bits(run: Path, decoder: Decoder) -> None:
    one = judged(run).first(1)
    assert (
        likelihood(decoder, one, judged(run, "train"), draws=2, seed=0)["told_all"][
            "standard_error"
        ]
        is None
    )
    with pytest.raises(DataError, match="0 held-out and 12 training pictures"):
        likelihood(decoder, judged(run).first(0), judged(run, "train"), draws=2, seed=0)


# Inversion


def test_inversion_gives_pictures_back_better_with_steps_and_a_refinement(
    run: Path, decoder: Decoder
) -> None:
    rows = inversion(decoder, judged(run, "train"), [5, 25, 51])
    mean = {(each["steps"], each["refinements"]): np.mean(each["psnr_db"]) for each in rows}
    assert set(mean) == {(5, 0), (5, 1), (25, 0), (25, 1)}  # T is 50
    assert [each["calls"] for each in rows] == [10, 15, 50, 75]
    assert all(len(each["psnr_db"]) == 12 for each in rows)
    assert 20 < mean[5, 0] < mean[25, 0] - 1
    assert all(mean[steps, 0] < mean[steps, 1] - 0.5 for steps in (5, 25))
