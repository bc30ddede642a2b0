"""A second night with a few new URLs: they alone are embedded and added to the index, and a recipe
that keeps its models trains none.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from flows.config.run_config import RunConfig, load_recipe
from flows.orchestration.run_stage import run_stage
from flows.orchestration.stages import STAGES
from flows.runs.planning import frozen_model, plan, with_needs
from flows.runs.stage import StageJob, StageResult
from indexing.ann.index import Index
from infra.compute.cluster import Cluster
from infra.storage import store
from tests.flows.ingest.test_ingest import config_for, write_list
from tests.helpers.hostile_server import Server
from tests.helpers.tiny_run import RECIPE

NIGHT = with_needs(["index"], STAGES)
FIRST, SECOND = range(60), range(69)
pytestmark = pytest.mark.slow


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def config_of(server: Server, numbers: range, folder: Path, *overrides: str) -> RunConfig:
    """Return the tiny recipe over a list of these pictures."""
    rows: list[dict[str, Any]] = [
        {"url": f"{server.base}/good/{number}.png", "caption": f"picture {number}"}
        for number in numbers
    ]
    data = config_for(write_list(folder / "list.jsonl", rows))
    quick = [
        "clip.images=64",
        "cluster.clip_workers=1",
        "curate.held_out_styles=[]",
        "curate.drop_duplicates=false",
    ]
    return load_recipe(str(RECIPE), [*quick, *overrides]).model_copy(update={"data": data})


def night(root: store.Root, config: RunConfig, cluster: Cluster) -> dict[str, StageResult]:
    """Bring all as far as the index up to date."""
    done: dict[str, StageResult] = {}
    for stage in NIGHT:
        done[stage.name] = run_stage(
            stage,
            root,
            config,
            {name: each.committed for name, each in done.items()},
            cluster,
            print,
        )
    return done


def embedded(result: StageResult) -> tuple[list[str], np.ndarray]:
    """Return captions and picture vectors of an embed folder."""
    folder = result.committed.local_folder
    captions = pq.read_table(folder / "metadata")["caption"].to_pylist()
    return captions, np.concatenate(
        [np.load(file) for file in sorted((folder / "img_emb").glob("*.npy"))]
    )


def test_a_night_embeds_and_indexes_only_what_is_new_and_trains_nothing(
    server: Server, tmp_path: Path
) -> None:
    root = store.open_root(str(tmp_path / "root"))
    config = config_of(server, FIRST, tmp_path)
    with Cluster(config.cluster) as cluster:
        first = night(root, config, cluster)
        assert first["embed"].committed.manifest["counts"]["taken_over"] == 0

        config = config_of(server, SECOND, tmp_path)  # by default new data asks for a new CLIP
        assert {each.stage.name: each.state for each in plan(root, config, NIGHT)} == dict.fromkeys(
            first, "stale"
        )

        config = config_of(server, SECOND, tmp_path, "clip.retrain=never")
        planned = {each.stage.name: each for each in plan(root, config, NIGHT)}
        assert {name: each.state for name, each in planned.items()} == dict.fromkeys(
            first, "stale"
        ) | {"clip": "current"}
        assert (
            planned["clip"].why == 'kept, [clip] retrain = "never", although ingest, curate changed'
        )
        second = night(root, config, cluster)
        assert (second["clip"].state, second["clip"].key) == ("current", first["clip"].key)
        embed, index = (second[name].committed.manifest["counts"] for name in ("embed", "index"))
        assert (embed["out"], embed["taken_over"]) == (69, 60) and (
            index["out"],
            index["added_to"],
        ) == (69, 60)
        assert all(each.state == "current" for each in plan(root, config, NIGHT))

        whole = next(
            stage for stage in STAGES if stage.name == "embed"
        )  # the same, embedded all over
        apart = store.open_root(str(tmp_path / "other"))
        inputs = {name: second[name].committed for name in whole.needs}
        again = run_stage(whole, apart, config, inputs, cluster, print)
        assert again.committed.manifest["counts"]["taken_over"] == 0
        wider = config_of(
            server, SECOND, tmp_path, "clip.retrain=never", "clip.width=24"
        )  # other settings: nothing to keep
        assert {each.stage.name: each.state for each in plan(root, wider, NIGHT)}["clip"] == "stale"
    captions, vectors = embedded(second["embed"])
    assert captions == embedded(again)[0] and set(captions) == {
        f"picture {number}" for number in SECOND
    }
    assert np.abs(vectors.astype(np.float32) - embedded(again)[1]).max() < 2e-3
    assert np.array_equal(vectors[: len(FIRST)], embedded(first["embed"])[1])
    opened = Index.open(second["index"].committed.local_folder)
    scores, rows = opened.search(vectors.astype(np.float32), 1)
    assert scores.min() > 0.99 and opened.count == len(SECOND)
    assert np.abs(vectors[rows[:, 0]] - vectors).max() < 2e-3


def test_a_kept_model_is_of_the_same_code_and_of_the_same_clip(
    server: Server, tmp_path: Path
) -> None:
    root = store.open_root(str(tmp_path / "root"))
    config = config_of(server, FIRST, tmp_path, "clip.retrain=never", "prior.retrain=never")
    clip, prior = (
        replace(stage, needs=(), wants=(), run=write_model)
        for stage in STAGES
        if stage.name in ("clip", "prior")
    )
    assert frozen_model(root, config, clip, {}) is None
    with Cluster(config.cluster) as cluster:
        made = run_stage(clip, root, config, {}, cluster, print).committed
        run_stage(prior, root, config, {}, cluster, print)
    found = frozen_model(root, config, clip, {})
    assert found and found.key == made.key
    assert frozen_model(root, config, replace(clip, version=clip.version + 1), {}) is None
    assert frozen_model(root, config, prior, {"clip": made.digest}) is None, (
        "made with no CLIP, so not with this one"
    )
    (made.local_folder / "x.bin").write_bytes(b"cut")
    assert frozen_model(root, config, clip, {}) is None, "a damaged folder is none"


def write_model(job: StageJob) -> dict[str, Any]:
    """Stand in for a training."""
    (job.out / "x.bin").write_bytes(b"model")
    return {"in": 1, "out": 1, "dropped": {}}
