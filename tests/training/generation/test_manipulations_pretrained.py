"""Manipulations of pictures work with a CLIP that `[clip] pretrained` loads from open_clip's form,
by its own eyes and its own words.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.short_training import learn
from tests.helpers.small_systems import DECODER_CONFIG, PRIOR_CONFIG
from tests.helpers.stage_folders import training_folders
from tests.training.generation.test_manipulations import STEPS, near, pictures
from tests.training.models.test_open_clip_format import small, stand_in, their_model
from training.generation import manipulations
from training.generation.manipulations import Latents
from training.generation.unclip import Unclip
from training.jobs import train
from training.models import clip as clip_model
from training.models.clip import CLIP
from training.models.decoder import Decoder
from training.models.diffusion_prior import Prior
from training.models.pixels import to_pixels
from training.models.tokenizer import Tokenizer
from training.optim.step import Step
from training.sections.tokenizer_section import TokenizerConfig

__all__ = ["stand_in"]


@pytest.fixture(scope="module")
def theirs(stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIP, Path]:
    """A CLIP in open_clip's form, and the folders of a system that adopted it and whose decoder has
    learnt the two pictures.
    """
    folder = tmp_path_factory.mktemp("theirs")
    expected = their_model(folder / "open_clip", stand_in)
    (folder / "system").mkdir()
    config = small(pretrained=str(folder / "open_clip"), image_heads=1, text_heads=1)
    adopted = training_folders(folder, folder / "work")
    train._adopt(config, TokenizerConfig(), adopted, rows=0)
    adopted.output.folder.rename(folder / "system" / "clip")
    clip, tokenizer = clip_model.load(folder / "system" / "clip")
    torch.manual_seed(0)
    sizes = (clip.config.embed_dim, tokenizer.vocab_size, tokenizer.context)
    decoder = Decoder(DECODER_CONFIG, *sizes)
    known = (
        to_pixels(torch.from_numpy(pictures()), 8),
        clip_model.embed_images(clip, torch.from_numpy(pictures())),
        tokenizer(["", ""]),
    )
    x_0, z_i, ids = (each.repeat(8, *[1] * (each.ndim - 1)) for each in known)
    decoder.text.tokens.requires_grad_(False)  # a large table, of which this needs nothing
    learn(
        decoder, lambda number: decoder.loss(Step(number, 0, 16, 0, 0, 1), x_0, z_i, ids), 100, 1e-2
    )
    for name, model, section in (
        ("prior", Prior(PRIOR_CONFIG, *sizes), PRIOR_CONFIG),
        ("decoder", decoder, DECODER_CONFIG),
    ):
        (folder / "system" / name).mkdir()
        tokenizer.save(folder / "system" / name / "tokenizer.json")
        train.write_model(name, model, model.state_dict(), section, folder / "system" / name)
    return expected, folder / "system"


@pytest.fixture(scope="module")
def model(theirs: tuple[CLIP, Path]) -> Unclip:
    return Unclip.load(theirs[1])


@pytest.fixture(scope="module")
def latents(model: Unclip) -> Latents:
    return manipulations.invert(model, pictures(), STEPS)


def test_a_picture_comes_back_and_variations_stray_from_it(
    model: Unclip, latents: Latents, theirs: tuple[CLIP, Path]
) -> None:
    assert torch.equal(
        latents.z_i, clip_model.embed_images(theirs[0], torch.from_numpy(pictures()))
    ), "as open_clip's weights see it"
    assert min(latents.psnr_db) > 30
    assert near(
        manipulations.vary(model, latents, 0.0, 2, 5, STEPS), np.repeat(latents.rebuilt[:1], 2, 0)
    )
    varied = manipulations.vary(model, latents, 1.0, 3, 5, STEPS)
    assert not near(varied[0], varied[1]) and not near(varied[:1], latents.rebuilt[:1])


def test_a_text_diff_goes_where_its_own_text_tower_points(
    model: Unclip,
    latents: Latents,
    theirs: tuple[CLIP, Path],
    stand_in: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    z_t = clip_model.embed_texts(
        theirs[0], Tokenizer.from_merges(stand_in), ["a photo", "a red heart"]
    )
    z_d = F.normalize(z_t[1] - z_t[0], dim=0)
    asked: list[torch.Tensor] = []
    draw = manipulations.draw
    monkeypatch.setattr(
        manipulations,
        "draw",
        lambda model, z_i, *others, **more: (asked.append(z_i), draw(model, z_i, *others, **more))[
            1
        ],
    )
    row = manipulations.text_diff(model, latents, ("a photo", "a red heart"), 0.5, 4, STEPS)
    whole, walked = (
        (a @ b).clamp(-1, 1).acos()
        for a, b in ((latents.z_i[0], z_d), (latents.z_i[0], asked[0][-1]))
    )
    assert float(walked) == pytest.approx(0.5 * float(whole), rel=1e-3)
    assert float(asked[0][-1] @ z_d) == pytest.approx(float((0.5 * whole).cos()), abs=1e-3)
    assert near(row[:1], latents.rebuilt[:1]) and not near(row[-1], row[0], 5)


def test_it_draws_from_text_and_interpolates(model: Unclip, latents: Latents) -> None:
    drawn = model.generate(["a red heart", "blue"], 2)
    assert drawn.shape == (2, 2, 8, 8, 3) and not near(drawn[0], drawn[1])
    row = manipulations.interpolate(model, latents.z_i, 3, latents=latents, steps=STEPS)
    assert near(row[[0, -1]], latents.rebuilt, 3)
