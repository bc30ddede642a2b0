"""A picture comes back from its (z_i, x_T); variations, interpolations and text diffs move z_i and
the noise as they say.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flows.cli.main import main
from tests.helpers.short_training import learn
from tests.helpers.small_systems import write_root, write_system
from training.diffusion.noise import Stream, generators, noise
from training.generation import manipulations
from training.generation.manipulations import Latents
from training.generation.unclip import SEED_STRIDE, Unclip
from training.models.pca import Pca
from training.models.pixels import to_images, to_pixels
from training.optim.step import Step

STEPS = 16


def pictures() -> np.ndarray:
    """Two pictures: a dark left half, a red upper half."""
    made = np.full((2, 16, 16, 3), 230, np.uint8)
    made[0, :, :8] = 30
    made[1, :8] = (220, 20, 20)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Unclip:
    """A system whose decoder has learnt the two pictures."""
    folder = write_system(tmp_path_factory.mktemp("run"))
    model = Unclip.load(folder / "clip", folder / "prior", folder / "decoder")
    decoder = model.decoder.requires_grad_(True)
    known = (
        to_pixels(torch.from_numpy(pictures()), 8),
        manipulations.embed(model, pictures()),
        model.tokenizer(["", ""]),
    )
    x_0, z_i, ids = (each.repeat(8, *[1] * (each.ndim - 1)) for each in known)
    learn(
        decoder, lambda number: decoder.loss(Step(number, 0, 16, 0, 0, 1), x_0, z_i, ids), 80, 1e-2
    )
    decoder.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def latents(model: Unclip) -> Latents:
    return manipulations.invert(model, pictures(), STEPS)


def near(a: np.ndarray, b: np.ndarray, by: int = 1) -> bool:
    """Say whether pictures are equal but for rounding."""
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= by


def test_variations_from_the_embedding_alone_are_of_their_own_picture(model: Unclip) -> None:
    varied = manipulations.variations(model, pictures(), 3, 0, STEPS)
    assert varied.shape == (2, 3, 8, 8, 3)
    away = np.abs(
        varied[:, :, None].astype(float) - manipulations.as_drawn(model, pictures())[None, None]
    ).mean((3, 4, 5))  # (2, 3, 2)
    assert (away.argmin(2) == np.arange(2)[:, None]).all()
    assert not np.array_equal(varied[:, 0], varied[:, 1]) and np.array_equal(
        varied, manipulations.variations(model, pictures(), 3, 0, STEPS)
    )


def test_inversion_gives_the_picture_back_and_says_how_well(
    model: Unclip, latents: Latents
) -> None:
    shown = manipulations.as_drawn(model, pictures())
    assert min(latents.psnr_db) > 34 and latents.x_T.shape == (2, 3, 8, 8)
    assert [
        manipulations.psnr_db(a, b) for a, b in zip(shown, latents.rebuilt, strict=True)
    ] == latents.psnr_db
    swapped = manipulations.draw(model, latents.z_i.flip(0), latents.x_T, STEPS)
    assert not near(swapped, latents.rebuilt, 40)  # what it draws depends on z_i too


def test_psnr_is_that_of_the_definition() -> None:
    a = np.zeros((2, 2, 3), np.uint8)
    assert manipulations.psnr_db(a, a + 5) == pytest.approx(20 * math.log10(255 / 5))
    assert manipulations.psnr_db(a, a) == 99


def test_variations_stray_with_eta_alone(model: Unclip, latents: Latents) -> None:
    still = manipulations.vary(model, latents, 0.0, 2, 5, STEPS)
    assert near(still, np.repeat(latents.rebuilt[:1], 2, 0))
    some, all_of_it = (
        manipulations.vary(model, latents, eta, 6, 5, STEPS).astype(float) for eta in (0.3, 1.0)
    )
    strayed = [np.abs(each - latents.rebuilt[0]).mean() for each in (some, all_of_it)]
    assert 0 < strayed[0] < strayed[1]
    assert near(all_of_it[:2], manipulations.vary(model, latents, 1.0, 2, 5, STEPS))
    assert not near(all_of_it[0], all_of_it[1]) and not near(
        all_of_it, manipulations.vary(model, latents, 1.0, 6, 6, STEPS)
    )


def test_an_interpolation_has_one_noise_and_ends_at_both(model: Unclip, latents: Latents) -> None:
    row = manipulations.interpolate(model, latents.z_i, 5, seed=7, steps=STEPS)
    x_T = noise((1, 3, 8, 8), generators([7 * SEED_STRIDE], Stream.DECODER))
    for place, end in ((0, 0), (-1, 1)):
        assert near(
            row[place : place + 1 or None],
            manipulations.draw(model, latents.z_i[end : end + 1], x_T, STEPS),
        )
    assert not near(row[2], row[0], 20) and not near(row[2], row[4], 20)


def test_with_slerped_noise_the_ends_are_the_pictures(model: Unclip, latents: Latents) -> None:
    row = manipulations.interpolate(model, latents.z_i, 4, latents=latents, steps=STEPS)
    assert near(row[[0, -1]], latents.rebuilt, 3)


def test_a_text_diff_walks_a_share_of_the_angle_and_keeps_the_noise(
    model: Unclip, latents: Latents, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[tuple[Tensor, Tensor]] = []
    draw = manipulations.draw
    monkeypatch.setattr(
        manipulations,
        "draw",
        lambda model, z_i, x_T, *rest, **named: (
            walked.append((z_i, x_T)) or draw(model, z_i, x_T, *rest, **named)
        ),
    )
    row = manipulations.text_diff(model, latents, ("blue", "a red heart"), 0.5, 4, STEPS)
    (z, x_T), z_i = walked[0], latents.z_i[:1]
    texts = torch.from_numpy(model.encode_texts(["blue", "a red heart"]))
    z_d = F.normalize(texts[1:] - texts[:1], dim=-1)
    whole = torch.acos((z_i * z_d).sum())
    angles = torch.acos((z * z_i).sum(-1).clamp(-1, 1))
    torch.testing.assert_close(angles, torch.linspace(0, 0.5, 4) * whole, atol=2e-3, rtol=0)
    torch.testing.assert_close(torch.acos((z[-1:] * z_d).sum()), whole / 2, atol=1e-3, rtol=0)
    assert x_T.equal(latents.x_T[:1].expand(4, -1, -1, -1)) and near(row[:1], latents.rebuilt[:1])
    with pytest.raises(ValueError, match="choose two different captions"):
        manipulations.difference(model, "blue", " BLUE ")


def test_pca_is_that_of_a_singular_value_decomposition() -> None:
    vectors = (
        torch.randn(60, 7, generator=torch.Generator().manual_seed(0))
        * torch.tensor([5.0, 1, 3, 0.1, 2, 0.5, 4])
        + 2
    )
    pca = Pca.fit(vectors)
    _, values, rows = torch.linalg.svd((vectors - vectors.mean(0)).double(), full_matrices=False)
    torch.testing.assert_close(pca.eigenvalues.double(), values**2 / 60, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        (pca.components.double() @ rows.T).abs(),
        torch.eye(7, dtype=torch.float64),
        atol=1e-4,
        rtol=0,
    )
    for count in (1, 4, 7):
        error = (pca.truncate(vectors, count) - vectors).square().sum(1).mean()
        torch.testing.assert_close(error, pca.eigenvalues[count:].sum(), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="8 principal components: choose from 1 to 7"):
        pca.truncate(vectors, 8)


def test_more_components_come_nearer_to_the_whole(model: Unclip, latents: Latents) -> None:
    vectors = F.normalize(
        torch.cat(
            [
                latents.z_i.repeat(20, 1)
                + 0.3 * torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
            ]
        ),
        dim=-1,
    )
    drawn = manipulations.reconstruct(
        model, latents.z_i, Pca.fit(vectors), [1, 16], seed=3, steps=STEPS
    )
    assert (
        drawn.shape == (2, 3, 8, 8, 3)
        and near(drawn[:, 1], drawn[:, 2])
        and not near(drawn[:, 0], drawn[:, 2], 4)
    )


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_root(folder)
    for name, picture in zip(("one", "two"), pictures(), strict=True):
        Image.fromarray(picture).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "rows", "columns", "figure"),
    [
        (
            ["vary", "one.png", "--eta", "0.2", "--eta", "1", "--count", "3"],
            2,
            5,
            "rebuilt_psnr_db",
        ),
        (["interpolate", "one.png", "two.png", "--columns", "4", "--count", "2"], 2, 6, None),
        (
            ["interpolate", "one.png", "two.png", "--columns", "3", "--slerp-noise"],
            1,
            5,
            "rebuilt_psnr_db",
        ),
        (
            ["textdiff", "one.png", "a photo", "caf\u00e9 \udc80", "--columns", "3"],
            1,
            4,
            "rebuilt_psnr_db",
        ),
        (["reconstruct", "one.png", "two.png", "--pca-dims", "2,8,999"], 2, 4, "variance_held"),
    ],
)
def test_the_commands_write_labelled_grids_that_know_how_they_were_made(
    arguments: list[str], rows: int, columns: int, figure: str | None, place: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    code, out, err = command(
        capsys, *arguments, "--root", "root", "--steps", "3", "--seed", "4", "--json"
    )
    assert (code, err) == (0, "")
    result: dict[str, Any] = json.loads(out)
    assert (
        result.keys() == {"seed", "settings", "figures", "files", "grid"}
        and len(result["files"]) == rows * columns
    )
    assert set(result["figures"]) == ({figure} if figure else set())
    with Image.open(result["grid"]) as grid:
        assert (
            json.loads(str(grid.info["steps"])) == 3
            and grid.info["seed"] == "4"
            and grid.info["decoder"] == "decoder-key"
        )
        assert (
            len(json.loads(str(grid.info["column_labels"]))) == columns
            and len(json.loads(str(grid.info["row_labels"]))) == rows
        )
        assert min(grid.size) > 96
    with Image.open(result["files"][0]) as picture:
        assert (
            picture.size == (8, 8)
            and picture.info["run"] == "small"
            and picture.info["column_label"]
        )
    first = Path(result["files"][0]).read_bytes()
    assert command(capsys, *arguments, "--root", "root", "--steps", "3", "--seed", "4")[0] == 0
    assert Path(result["files"][0]).read_bytes() == first


def test_a_mistake_that_only_the_models_can_see_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    for arguments, message in (
        (["vary", "one.png", "--steps", "51"], "--steps 51: this decoder has 50"),
        (["textdiff", "one.png", "blue", "Blue"], "choose two different captions"),
        (["reconstruct", "one.png", "--pca-dims", "17,18"], "this run's z_i has 16 dimensions"),
    ):
        code, out, err = command(capsys, *arguments, "--root", "root")
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_to_images_and_as_drawn_agree(model: Unclip) -> None:
    assert np.array_equal(
        manipulations.as_drawn(model, pictures()),
        to_images(to_pixels(torch.from_numpy(pictures()), 8)),
    )
