"""Stages that are quick but write real files: the house is tested with them, without torch, Ray and
downloads.

`python -m tests.helpers.fake_stages ROOT SECONDS` runs them in a process of its own; `--kill-at N`
has it end by SIGKILL at its N-th file
operation in ROOT, `--count` writes down how many there are, `--prefect` runs them as a flow.
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from flows.orchestration.run_stage import run_stage
from flows.recipe_run import RecipeRun
from flows.runs.stage import Stage, StageJob
from infra.compute.cluster import Cluster, ClusterConfig
from infra.errors import CallerError, StorageAwayError
from infra.settings import Section
from infra.storage import manifests
from infra.storage.manifest_schema import StageCounts
from infra.storage.stage_files import pinned_copy
from infra.storage.store import Root, open_root

CHUNKS = 12


class FakeSection(Section):
    """A section with one key that matters and one that does not."""

    word: str = "a"
    """Stands in every file."""
    seconds: float = Field(default=0, ge=0)
    """How long the stage takes."""
    outside_key = frozenset({"seconds"})


class FakeGate(Section):
    """What the flow itself asks of [evaluate]."""

    promote_if: tuple[str, ...] = ()


class FakeConfig(Section):
    """Three sections for four stages."""

    data: FakeSection = FakeSection()
    clip: FakeSection = FakeSection()
    prior: FakeSection = FakeSection()
    evaluate: FakeGate = FakeGate()
    cluster: ClusterConfig = ClusterConfig()


def write_chunks(job: StageJob) -> StageCounts:
    """Write CHUNKS files that depend on the config and on every input file; some words make it
    fail.
    """
    section = getattr(job.config, {"embed": "clip"}.get(job.stage, job.stage))
    seed = hashlib.sha256(section.word.encode())
    for name in sorted(job.inputs):
        for path in sorted(pinned_copy(job.inputs[name].files).rglob("*.bin")):
            seed.update(path.read_bytes())
    if section.word == "broken":
        raise AssertionError("one line\nand the reason on another")
    if section.word == "huge":
        for index in range(100_000):
            (job.work / f"{index}.huge").write_bytes(b"x" * 50_000)
    if section.word == "refused":
        raise CallerError("[fake] word = refused: choose another")
    if section.word == "flaky" and not (job.work / "tried").exists():
        (job.work / "tried").touch()
        raise ConnectionResetError("the store hung up")
    if section.word == "away" and not (job.work / "tried").exists():
        (job.work / "tried").touch()
        raise StorageAwayError("cannot use s3://bucket: SlowDown")
    resumed = sum(1 for _ in job.work.glob("*.done"))
    for index in range(CHUNKS):
        try:
            time.sleep(section.seconds / CHUNKS)
        except KeyboardInterrupt as interrupt:
            raise (
                ConnectionResetError("the reader was cancelled")
                if section.word == "clumsy"
                else interrupt
            ) from None
        data = hashlib.sha256(seed.digest() + bytes([index])).digest() * 3000
        (job.out / "parts").mkdir(exist_ok=True)
        (job.out / "parts" / f"{index:02d}.bin").write_bytes(data)
        (job.work / f"{index:02d}.done").touch()
    return {"in": CHUNKS, "out": CHUNKS, "dropped": {}, "resumed": resumed}


FAKES = (
    Stage("data", (), ("data",), 1, write_chunks),
    Stage("clip", ("data",), ("clip",), 1, write_chunks),
    Stage("embed", ("data", "clip"), (), 1, write_chunks),
    Stage("prior", ("embed",), ("prior",), 1, write_chunks),
)


def run_all(
    root: Root, config: Any, stages: tuple[Stage, ...] = FAKES, say: Any = print
) -> dict[str, Any]:
    """Run the stages without Prefect and return their results by name."""
    done: dict[str, Any] = {}
    with Cluster(config.cluster) as cluster:
        for stage in stages:
            done[stage.name] = run_stage(
                stage,
                root,
                config,
                {name: done[name].committed for name in stage.needs},
                cluster,
                say,
            )
    return done


def fake_run(root: str, config: Any, stages: tuple[Stage, ...] = FAKES) -> RecipeRun:
    """Return a run of the fake stages for `flows.pipeline.run_stages`."""
    return RecipeRun(open_root(root), "fakes", "fakes", config, stages, manifests.now())


OPERATIONS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
    "fcntl.lockf",
}


def watch_operations(folder: Path, kill_at: int) -> list[str]:
    """Kill this process just before its `kill_at`-th file operation in `folder`; return the list
    that they are noted in.
    """
    seen: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and (
            event == "fcntl.lockf" or str(arguments[0]).startswith(str(folder))
        ):
            seen.append(event)
            if len(seen) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(note)
    return seen


def main(folder: Path, seconds: float, flags: list[str]) -> None:
    """Run the fakes as the flags say."""
    slow = FakeSection(seconds=seconds)
    config = FakeConfig(data=slow, clip=slow, prior=slow)
    operations = watch_operations(folder, int(flags[1]) if "--kill-at" in flags else 0)
    if "--prefect" in flags:
        from flows.scheduling.prefect_server import prefect_server

        with prefect_server(folder / "work" / "prefect"):
            from prefect import flow

            from flows.pipeline import run_stages

            flow(name="fakes")(lambda: run_stages(fake_run(str(folder), config)))()
    else:
        run_all(open_root(str(folder)), config)
    if "--count" in flags:
        (folder / "operations").write_text(str(len(operations)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
