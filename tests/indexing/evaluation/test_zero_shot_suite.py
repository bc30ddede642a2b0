"""The suite's figures are those of its models, leaks are counted, and the networks of the probes
are what they are called.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flows.demo.packaged_sets import png
from indexing.data.held_out import open_embedded
from indexing.data.images import read_picture
from indexing.data.labelled_sets import ImageSet
from indexing.evaluation.zero_shot_suite import SIDE_PX, SuiteConfig, draw_unseen, suite
from indexing.report.interval_svg import plot
from infra.errors import CallerError
from tests.helpers.evaluation_run import (
    colour,
    direction,
    encode_images,
    row,
    subject,
    usual_rows,
    write_run,
)
from tests.helpers.stage_folders import shards_in
from training.models import imagenet_features


def colours_set(count: int = 4, each: int = 12, first: int = 12) -> ImageSet:
    """Pictures of one colour each, a little noise on them, named as the models of
    tests.helpers.evaluation_run know them.
    """
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(count), each)
    made = [
        np.clip(np.array(colour(first + label)) + rng.integers(-3, 4, (20, 20, 3)), 0, 255).astype(
            np.uint8
        )
        for label in labels
    ]
    return ImageSet(
        "plain colours",
        [png(each) for each in made],
        labels,
        [f"colour {first + label}" for label in range(count)],
        (),
    )


def measure(
    folder: Path, sets: list[ImageSet], images: Any = encode_images, **networks: Any
) -> Any:
    write_run(folder, usual_rows())
    return suite(
        SuiteConfig(pictures=100),
        subject(folder, images=images),
        sets,
        ("{}", "a {}"),
        24,
        networks,
    )


def test_a_clip_that_knows_the_classes_is_right_and_a_blind_one_is_at_nothing(
    tmp_path: Path,
) -> None:
    zero, against = measure(tmp_path / "a", [colours_set()])
    row = zero["tables"][0]["rows"][0]
    assert (
        row[:3] == ["plain colours", 48, 4]
        and row[3]["value"] == row[5]["value"] == 1.0
        and row[6]["value"] == row[7]["value"] == 0.25
    )
    assert row[8] == "above chance and majority"
    assert (
        against["tables"][0]["rows"][0][1]["value"] == 1.0
        and against["charts"][0]["rows"][0]["value"] <= 0.05
    )
    assert all((tmp_path / "a" / "out" / each["picture"]).is_file() for each in zero["pictures"])
    blind = measure(tmp_path / "b", [colours_set()], lambda pictures: np.ones((len(pictures), 16)))
    assert (
        blind[0]["tables"][0]["rows"][0][3]["value"] == 0.25
        and blind[0]["tables"][0]["rows"][0][8] == "not different from chance"
    )


def test_a_probe_on_better_features_beats_a_clip_that_cannot_name_them(tmp_path: Path) -> None:
    wrong = lambda pictures: encode_images(pictures)[:, ::-1].copy()  # noqa: E731
    mean_colour = lambda pictures: pictures.mean((1, 2)).astype(np.float32)  # noqa: E731
    _, against = measure(tmp_path, [colours_set()], wrong, colours=mean_colour)
    name, zero, _, probed = against["tables"][0]["rows"][0]
    assert (name, probed["value"]) == ("plain colours", 1.0) and zero["value"] < 0.8
    bars = next(
        each for each in against["charts"] if each["kind"] == "bars" and "colours" in each["title"]
    )
    assert bars["rows"][0]["value"] == pytest.approx(zero["value"] - 1.0)
    shots = next(each for each in against["charts"] if each["kind"] == "lines")["series"]
    assert [point["x"] for point in shots["colours"]] == [1, 2, 4, 8, 16, 32] and shots["colours"][
        -1
    ]["value"] == 1.0
    assert [point.get("name") for point in shots["colours"]] == [None] * 5 + ["all"]
    assert {
        key: shots["colours"][-1][key] for key in probed
    } == probed  # what the table calls the probe is the curve's "all"
    curve = next(plot(each) for each in against["charts"] if each["kind"] == "lines")
    assert ">all</text>" in curve and ">32</text>" not in curve and ">16</text>" in curve


def test_clip_sees_pictures_at_its_own_side_and_other_networks_at_theirs(tmp_path: Path) -> None:
    sides: dict[str, set[int]] = {"clip": set(), "network": set()}

    def seen_by(name: str, pictures: Any) -> Any:
        sides[name].add(pictures.shape[1])
        return encode_images(pictures)

    measure(
        tmp_path,
        [colours_set()],
        lambda pictures: seen_by("clip", pictures),
        other=lambda pictures: seen_by("network", pictures),
    )
    assert sides == {"clip": {24}, "network": {SIDE_PX}}


def test_no_picture_that_training_saw_is_judged_and_others_take_their_places(
    tmp_path: Path,
) -> None:
    write_run(tmp_path, usual_rows())
    embedded = open_embedded(tmp_path / "embed")
    rows = [
        embedded.table.slice(int(row), 1).to_pylist()[0] for row in embedded.rows("train")[:6:2]
    ]
    exact = (tmp_path / "shards" / rows[0]["shard"]).read_bytes()[
        rows[0]["offset"] : rows[0]["offset"] + rows[0]["size_bytes"]
    ]
    assert hashlib.sha256(exact).hexdigest() == rows[0]["sha256"]
    again = [png(read_picture(row, shards_in(tmp_path), 40)) for row in rows[1:]]
    names = ["colour 0", "colour 12"]
    leaky = ImageSet(
        "leaky",
        [exact, *again, *colours_set().encoded[:3]],
        np.array([0, 0, 0, 1, 1, 1]),
        names,
        (),
    )
    seen = ImageSet("seen", [exact, *again], np.array([0, 0, 0]), names, ())

    def judged(at_most: int) -> tuple[list[Any], list[Any]]:
        config = SuiteConfig(probe=False, pictures=at_most)
        (found,) = suite(config, subject(tmp_path), [leaky, seen], ("{}",), 24, {})
        return found["tables"][0]["rows"], found["tables"][1]["rows"]

    scores, left_out = judged(100)
    assert left_out == [["leaky", 6, 6, 1, 2, 3], ["seen", 3, 3, 1, 2, 0]]
    assert (
        len(scores) == 1 and scores[0][1] == 3 and scores[0][3]["value"] == 1.0
    )  # the plain colours, which training has not
    drawn = draw_unseen(leaky, 2, 24, subject(tmp_path))
    assert (
        drawn.images.labels.tolist() == [1, 1]
        and drawn.same_file + drawn.same_picture == drawn.looked_at - 2
    )
    assert np.allclose(drawn.vectors, encode_images(drawn.images.pictures(24)), atol=1e-6)


def test_a_seen_picture_is_found_behind_siblings_that_lie_nearer(tmp_path: Path) -> None:
    # One embedding for four trained concepts and the picture that one of them shows: which of them
    # is the nearest says nothing.
    rows = [row(concept, "plain", "train") for concept in range(8)]
    vectors = np.stack(
        [direction(0) + 0.05 * direction(1) * (concept != 5) for concept in range(8)]
    )
    write_run(tmp_path, rows, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    embedded = open_embedded(tmp_path / "embed")
    shown = [
        png(read_picture(embedded.table.slice(place, 1).to_pylist()[0], shards_in(tmp_path), 40))
        for place in (5, 2)
    ]
    some = ImageSet(
        "siblings", [*shown, colours_set().encoded[0]], np.array([0, 0, 1]), ["a", "b"], ()
    )
    toward = direction(0) + 0.05 * direction(1)

    def encode(pictures: Any) -> np.ndarray:
        return np.tile(toward / np.linalg.norm(toward), (len(pictures), 1)).astype(np.float32)

    drawn = draw_unseen(some, 3, 24, subject(tmp_path, images=encode))
    assert (drawn.same_picture, drawn.images.labels.tolist()) == (2, [1])


def by_the_paper(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """ResNet-50 as its paper's table 1 tells it, with torchvision's stride, from a state dict
    alone: (B, 3, 224, 224) to (B, 2048).
    """

    def conv_bn(x: torch.Tensor, conv: str, bn: str, stride: int = 1) -> torch.Tensor:
        weight = state[f"{conv}.weight"]
        x = torch.nn.functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var, scale, shift = (
            state[f"{bn}.{name}"][:, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = torch.nn.functional.max_pool2d(
        conv_bn(x, "conv1", "bn1", 2).clamp(min=0), 3, stride=2, padding=1
    )
    for layer, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = conv_bn(x, f"{name}.conv1", f"{name}.bn1").clamp(min=0)
            y = conv_bn(y, f"{name}.conv2", f"{name}.bn2", stride).clamp(min=0)
            y = conv_bn(y, f"{name}.conv3", f"{name}.bn3")
            if block == 0:
                x = conv_bn(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = (x + y).clamp(min=0)
    return x.flatten(2).mean(2)


def test_the_resnet_is_torchvisions_by_names_size_and_what_it_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = imagenet_features.ResNet50()
    assert (
        sum(p.numel() for p in model.parameters()) == 25_557_032 - 2_049_000
    )  # torchvision's, less its classifier
    state = model.state_dict()
    assert {
        "conv1.weight",
        "layer1.0.downsample.1.running_var",
        "layer3.5.bn3.num_batches_tracked",
        "layer4.2.conv2.weight",
    } <= set(state)
    assert len(state) == 318
    for name, value in state.items():  # statistics that a mistake would not survive
        if name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1)
        elif value.ndim == 1 and name.endswith(("running_var", "weight")):
            value.uniform_(0.5, 1.5)
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "r50.pth")
    pictures = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3)).astype(np.uint8)
    found = imagenet_features.resnet_50(tmp_path / "r50.pth")(pictures)
    large = torch.nn.functional.interpolate(
        torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255.0,
        (224, 224),
        mode="bilinear",
        antialias=True,
    )
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406])[:, None, None],
        torch.tensor([0.229, 0.224, 0.225])[:, None, None],
    )
    with torch.no_grad():
        expected = by_the_paper(state, (large - mean) / std)
    assert found.shape == (2, 2048) and expected.std() > 0.1
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-3 * float(expected.abs().max()))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "odd.pth")
    for path, said in (
        ("odd.pth", "is not a torchvision ResNet-50: conv1.weight"),
        ("none.pth", "does not exist"),
    ):
        with pytest.raises(CallerError, match=said):
            imagenet_features.resnet_50(tmp_path / path)


def test_the_packaged_network_tells_pictures_apart() -> None:
    network = imagenet_features.efficientnet_lite0()
    if network is None:
        pytest.skip("evaluation-packages.txt is not installed")
    pictures = np.random.default_rng(0).integers(0, 255, (3, 40, 40, 3)).astype(np.uint8)
    found = network(pictures)
    assert (
        found.shape == (3, 1280)
        and found.dtype == np.float32
        and np.allclose(found[:1], network(pictures[:1]), atol=1e-3)
    )
    assert np.abs(found[0] - found[1]).max() > 0.05
