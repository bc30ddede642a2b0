"""An up-sampler starts as bicubic, learns to do better, sees no more than a tile, and its tiles
leave no seams.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flows.cli.main import main
from flows.config.run_config import RunConfig, find_disagreement, load_recipe
from flows.evaluation import upsampler_section
from flows.orchestration.stages import STAGES
from flows.runs.planning import stages_of
from flows.runs.records import committed_of, find_run, write_run
from flows.runs.stage import inputs_of
from infra.errors import CallerError
from infra.storage import commits
from tests.helpers.manifest_facts import FACTS
from tests.helpers.short_training import learn
from tests.helpers.small_systems import write_root
from training.generation import upsampling_eval
from training.jobs.train import write_model
from training.models import degradation, upsampler_cascade
from training.models.pixels import to_float
from training.models.upsampler import Upsampler, count_parameters, crops, shrink, tiles
from training.models.upsampler import enlarge as bicubic
from training.optim.step import Step
from training.sections.upsampler_section import UpsamplerConfig

CONFIG = UpsamplerConfig(
    image_size_px=32,
    factor=4,
    crop_fraction=0.5,
    patch_px=2,
    width=16,
    multiples=(1, 2),
    depth=1,
    T=100,
    degradation="none",
    sampling_steps=4,
)


def pictures(count: int, side: int = 32) -> np.ndarray:
    """Draw discs with hard edges on white, which interpolation blurs: uint8 (count, side, side,
    3).
    """
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    made = np.full((count, side, side, 3), 255, np.uint8)
    for picture in made:
        centre, radius = draw.uniform(side / 4, 3 * side / 4, 2), draw.uniform(side / 6, side / 3)
        picture[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2] = draw.integers(0, 200, 3)
    return made


@pytest.fixture(scope="module")
def learnt() -> Upsampler:
    """An up-sampler that has learnt one picture."""
    torch.manual_seed(0)
    model = Upsampler(CONFIG)
    seen = torch.from_numpy(pictures(1))

    def loss(number: int) -> Tensor:
        step = Step(number, number * 8, 8, 0, 0, 1)
        return model.loss(step, seen[step.samples(1)])

    learn(model, loss, 150, 1e-2)
    return model.eval().requires_grad_(False)


def untrained(config: UpsamplerConfig = CONFIG) -> Upsampler:
    """Return an up-sampler whose output layer is not zero."""
    torch.manual_seed(0)
    model = Upsampler(config).eval().requires_grad_(False)
    for p in model.parameters():
        if not p.any():
            p.normal_(std=0.05)
    return model


def test_before_training_it_is_bicubic() -> None:
    torch.manual_seed(0)
    small = shrink(to_float(torch.from_numpy(pictures(2))), 4)
    torch.testing.assert_close(
        Upsampler(CONFIG).sample(small, [1, 2]), bicubic(small, 4), atol=1e-4, rtol=0
    )


def test_on_a_picture_learnt_by_heart_it_beats_interpolation(learnt: Upsampler) -> None:
    figures, _ = upsampling_eval.compare(learnt, pictures(1))
    psnr = figures["psnr_db"]
    assert (
        psnr["up-sampler"] > max(psnr["bicubic"], psnr["lanczos"]) + 0.7
        and figures["better_than"]["bicubic"] == 1
    )


def test_figures_are_the_means_of_all_pictures(learnt: Upsampler) -> None:
    figures, made = upsampling_eval.compare(learnt, pictures(4))
    assert (
        figures["n"] == 4
        and made["up-sampler"].shape == (4, 32, 32, 3)
        and made["small"].shape == (4, 8, 8, 3)
    )
    alone = [
        upsampling_eval.psnr_db(a, b) for a, b in zip(made["bicubic"], made["real"], strict=True)
    ]
    assert figures["psnr_db"]["bicubic"] == pytest.approx(np.mean(alone), abs=1e-3)


def test_it_draws_any_size_and_each_picture_by_its_own_seed(learnt: Upsampler) -> None:
    small = shrink(to_float(torch.from_numpy(pictures(2, 64))), 4)
    for height, width in ((3, 5), (7, 6)):
        part = small[:, :, :height, :width]
        found = learnt.sample(part, [4, 5])
        assert found.shape == (2, 3, 4 * height, 4 * width) and float(found.abs().max()) <= 1
        torch.testing.assert_close(learnt.sample(part[1:], [5])[0], found[1], atol=1e-4, rtol=0)
    assert not learnt.sample(small[:1], [9]).allclose(learnt.sample(small[:1], [4]), atol=1e-3)


def test_tiles_that_disagree_are_blended(monkeypatch: pytest.MonkeyPatch) -> None:
    model = untrained()
    level = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        Upsampler,
        "forward",
        lambda self, x_t, t, low: (
            torch.rand(len(x_t), 1, 1, 1, generator=level).expand_as(x_t).clone()
        ),
    )
    drawn = model.sample(torch.zeros(1, 3, 64, 48), [1], steps=1, tile_px=64)
    jumps = [(drawn.diff(dim=dim)).abs().max().item() for dim in (2, 3)]
    assert (
        float(drawn.max() - drawn.min()) > 0.5 and max(jumps) < 0.15
    )  # without blending a jump is as large as the difference


@pytest.mark.parametrize(
    ("height", "width", "side"), [(4, 4, 4), (5, 9, 4), (16, 16, 4), (7, 30, 6)]
)
def test_tiles_cover_all_and_stay_inside(height: int, width: int, side: int) -> None:
    covered = np.zeros((height, width), int)
    for top, left in tiles(height, width, side):
        assert 0 <= top <= height - side and 0 <= left <= width - side
        covered[top : top + side, left : left + side] += 1
    assert covered.min() >= 1


def test_the_network_never_sees_more_than_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        Upsampler,
        "forward",
        lambda self, x_t, t, enlarged: seen.append(tuple(x_t.shape)) or enlarged,
    )
    untrained().sample(torch.zeros(2, 3, 40, 24), [1, 2], steps=2)
    assert {shape[1:] for shape in seen} == {(3, 16, 16)} and max(shape[0] for shape in seen) == 16


def test_a_crop_is_a_piece_of_its_own_picture() -> None:
    numbered = torch.arange(2 * 6 * 6).view(2, 6, 6, 1).expand(-1, -1, -1, 3).to(torch.uint8)
    cut = crops(numbered, 4, torch.tensor([[0.0, 0.999], [0.5, 0.0]]))
    assert (
        cut.shape == (2, 4, 4, 3)
        and cut[0].equal(numbered[0, :4, 2:])
        and cut[1].equal(numbered[1, 1:5, :4])
    )


def test_the_loss_does_not_depend_on_the_number_of_workers() -> None:
    for kind in ("blur", "bsr"):
        model, seen = (
            untrained(CONFIG.model_copy(update={"degradation": kind})),
            torch.from_numpy(pictures(8)),
        )
        whole = model.loss(Step(3, 24, 8, 0, 0, 1), seen)
        halves = [
            model.loss(Step(3, 24, 8, 0, rank, 2), seen[4 * rank : 4 * rank + 4])
            for rank in range(2)
        ]
        torch.testing.assert_close((halves[0] + halves[1]) / 2, whole)


def test_the_blur_is_a_gaussian_of_sigma_0_6() -> None:
    point = torch.zeros(1, 3, 5, 5)
    point[:, :, 2, 2] = 1
    found = degradation.blur(point)[0, 0, 1:4, 1:4]
    weight = np.exp(-1 / (2 * 0.6**2))
    expected = np.outer([weight, 1, weight], [weight, 1, weight]) / (1 + 2 * weight) ** 2
    assert np.allclose(found, expected, atol=1e-6)


def test_bsr_degrades_differently_each_time_and_keeps_size_and_range() -> None:
    picture = pictures(1)[0].astype(np.float32) / 255
    made = [degradation.bsr(picture, np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3)]
    assert all(each.shape == picture.shape and each.min() >= 0 and each.max() <= 1 for each in made)
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])
    errors = [float(np.abs(each - picture).mean()) for each in made]
    assert min(errors) > 0.002 and max(errors) < 0.2 and max(errors) > 1.2 * min(errors)


def test_only_the_share_asked_for_is_degraded() -> None:
    small = shrink(to_float(torch.from_numpy(pictures(4))), 4)
    for kind in ("blur", "bsr"):
        made = degradation.apply(
            kind, small, torch.tensor([True, False, True, False]), [1, 2, 3, 4]
        )  # type: ignore[arg-type]
        assert [made[place].equal(small[place]) for place in range(4)] == [False, True, False, True]
    assert degradation.apply("none", small, torch.ones(4, dtype=torch.bool), [1, 2, 3, 4]).equal(
        small
    )


def test_a_written_upsampler_enlarges_as_before(learnt: Upsampler, tmp_path: Path) -> None:
    write_model("upsampler", learnt, learnt.state_dict(), CONFIG, tmp_path)
    small = pictures(2, 8)
    assert np.array_equal(
        upsampler_cascade.enlarge([upsampler_cascade.load(tmp_path)], small, [3, 4]),
        upsampler_cascade.enlarge([learnt], small, [3, 4]),
    )
    assert count_parameters(CONFIG) == sum(p.numel() for p in learnt.parameters())


def test_lanczos_and_bicubic_keep_a_plain_picture() -> None:
    plain = np.full((2, 8, 8, 3), 77, np.uint8)
    for name in upsampling_eval.INTERPOLATIONS:
        assert (
            upsampling_eval.interpolate(plain, 4, name) == 77
        ).all() and upsampling_eval.interpolate(plain, 4, name).shape == (
            2,
            32,
            32,
            3,
        )


def with_sections(**sections: dict[str, object]) -> RunConfig:
    config = load_recipe(
        "quickstart", ["data.image_size_px=1024", "decoder.image_size_px=64", "decoder.patch_px=4"]
    )
    return config.model_copy(
        update={name: UpsamplerConfig.model_validate(section) for name, section in sections.items()}
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"upsampler": {}}, ""),
        ({"upsampler": {}, "upsampler_2": {"image_size_px": 1024, "degradation": "bsr"}}, ""),
        ({"upsampler_2": {}}, "[upsampler_2] enlarges what [upsampler] draws, which is missing"),
        (
            {"upsampler": {"image_size_px": 2048}},
            "[upsampler] image_size_px = 2048 but [data] image_size_px = 1024",
        ),
        (
            {"upsampler": {"image_size_px": 128}},
            "it gets pictures of 64 px from [decoder] and factor = 4: it must be 256",
        ),
        (
            {"upsampler": {}, "upsampler_2": {}},
            "[upsampler_2] image_size_px = 256 but it gets pictures of 256 px from [upsampler]",
        ),
        (
            {"upsampler": {"crop_fraction": 0.2}},
            "[upsampler] crop_fraction = 0.2 cuts crops of 51 px",
        ),
        ({"upsampler": {"batch_size": 3}}, ""),
    ],
)
def test_sections_that_disagree_are_named(
    sections: dict[str, dict[str, object]], message: str
) -> None:
    found = find_disagreement(with_sections(**sections))
    assert (message in found) if message else found == ""


def test_a_recipe_without_the_section_has_no_such_stage() -> None:
    config = load_recipe("quickstart")
    names = [stage.name for stage in stages_of(config, (), STAGES)]
    assert "upsampler" not in names and names[-1] == "evaluate"
    with pytest.raises(CallerError, match=r"the recipe has no section \[upsampler\]"):
        stages_of(config, ("upsampler",), STAGES)
    assert [
        stage.name for stage in stages_of(load_recipe("upsampling"), ("upsampler",), STAGES)
    ] == ["ingest", "curate", "upsampler"]


def test_shrinking_is_by_area() -> None:
    x = torch.randn(2, 3, 8, 8)
    expected: Tensor = F.interpolate(x, scale_factor=0.25, mode="area")
    torch.testing.assert_close(shrink(x, 4), expected)


def test_the_commands_enlarge_what_was_drawn_and_what_is_given(
    learnt: Upsampler,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_root(tmp_path)
    Image.fromarray(pictures(1)[0]).save("disc.png")

    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([*arguments, "--root", "root", "--steps", "2", "--json"])
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    for arguments in (["upsample", "disc.png"], ["generate", "blue", "--upsample"]):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "") and "has no upsampler" in err and err.count("\n") == 1
    (tmp_path / "up").mkdir()
    write_model("upsampler", learnt, learnt.state_dict(), CONFIG, tmp_path / "up")
    record = find_run(root)
    committed = {stage: committed_of(root, record, stage) for stage in record["stages"]}
    facts = FACTS | {"started": record["started"]}
    committed["upsampler"] = commits.commit(root, "upsampler", "up-key", tmp_path / "up", facts)
    write_run(root, "small", "small.toml", record["started"], committed)
    for arguments, count in (
        (["upsample", "disc.png", "--side", "8"], 4),
        (["generate", "blue", "--upsample", "--count", "2"], 2),
    ):
        code, out, err = command(*arguments)
        result = json.loads(out)
        assert (
            (code, err) == (0, "")
            and result["settings"]["upsampler"] == "up-key"
            and len(result["files"]) == count
        )
        with Image.open(result["files"][-1]) as picture:
            assert picture.size == (32, 32)
    assert command("upsample", "disc.png", "--side", "2000")[0] == 2
    with Image.open(
        json.loads(command("generate", "blue", "--count", "1")[1])["files"][0]
    ) as picture:
        assert picture.info["guidance"] == "2.0" and picture.info["steps"] == "2", (
            "what was drawn with, not what was not asked"
        )


def test_memory_in_tiles_grows_with_the_picture_alone(learnt: Upsampler) -> None:
    tiled = {side: upsampling_eval.peak_bytes(learnt, side) for side in (96, 160)}
    picture_bytes = 3 * 4 * (160**2 - 96**2)
    assert picture_bytes < tiled[160] - tiled[96] < 8 * picture_bytes
    assert upsampling_eval.peak_bytes(learnt, 160, tile_px=160) > 2 * tiled[160]


def test_the_report_has_a_section_for_each_upsampler(learnt: Upsampler, tmp_path: Path) -> None:
    stage = tmp_path / "upsampler"
    stage.mkdir()
    write_model("upsampler", learnt, learnt.state_dict(), CONFIG, stage)
    figures, made = upsampling_eval.compare(learnt, pictures(3))
    (stage / "comparison.json").write_text(json.dumps({"held_out_style": figures}))
    Image.fromarray(made["up-sampler"][0]).save(stage / "comparison.png")
    assert upsampler_section.sections({"decoder": tmp_path}, tmp_path) == []
    (found,) = upsampler_section.sections({"upsampler": stage}, tmp_path / "report")
    psnr, memory = found["tables"]
    assert [row[:2] for row in psnr["rows"]] == [
        [name, figures["psnr_db"][key]]
        for name, key in (
            ("bicubic", "bicubic"),
            ("Lanczos", "lanczos"),
            ("up-sampler", "up-sampler"),
        )
    ]
    assert [row[:2] for row in memory["rows"]] == [
        [f"{side} px", upsampling_eval.peak_bytes(learnt, side) / 1e6] for side in (32, 64)
    ]
    assert (tmp_path / "report" / found["pictures"][0]["picture"]).read_bytes() == (
        stage / "comparison.png"
    ).read_bytes()
    evaluate = next(stage for stage in STAGES if stage.name == "evaluate")
    assert "upsampler" in inputs_of(evaluate, ("upsampler",)) and "upsampler" not in inputs_of(
        evaluate, ()
    )
