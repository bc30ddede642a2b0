"""A stage handed to a Ray cluster as a job, under an id that its ROOT and key decide.

The driver that submits only waits, shows the job's log and reads manifests: it may die and come back, on another machine too. The
claim below `ROOT/jobs/` says which attempt may commit (`flows/orchestration/ray_job.py`) and goes when the stage is committed.
"""

import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flows.orchestration.stages import trained_of
from flows.runs.planning import fault, frozen_model
from flows.runs.stage import Stage, StageResult, inputs_of, key_of
from infra.compute.cluster import StageResources
from infra.compute.ray_jobs import Job, JobServer
from infra.storage import manifests, store
from infra.storage.manifests import Committed
from infra.storage.store import Root

CODE = Path(__file__).parents[2]
ENTRYPOINT = "flows.orchestration.ray_job"
LEFT_OUT = [
    ".git",
    ".venv*",
    "*data*/",
    "out",
    "*.egg-info",
    "**/__pycache__",
    ".*_cache",
    "*.tar",
    "*.parquet",
    "*.safetensors",
]
CARRIED = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "UNCLIP_SCRATCH", "OMP_NUM_THREADS")
"""Variables that travel with a job. Ray keeps and shows them, so secrets do not: the cluster's nodes have their own."""


def submit_stage(
    stage: Stage,
    root: Root,
    config: Any,
    inputs: Mapping[str, Committed],
    address: str,
    say: Callable[[str], None],
) -> StageResult:
    """Have one stage made on the cluster whose job server is at `address`, unless it is current; the twin of `running.run_stage`."""
    from flows.orchestration.ray_job import claim_name

    clock = time.monotonic()
    stage_inputs = {name: inputs[name] for name in inputs_of(stage, inputs)}
    stays = frozen_model(root, config, stage, trained_of(stage_inputs))
    if stays:
        return StageResult(stage.name, stays.key, "current", time.monotonic() - clock, stays)
    key = key_of(stage, config, {name: committed.key for name, committed in stage_inputs.items()})

    def current() -> Committed | None:
        committed_before = manifests.find(root, stage.name, key)
        return (
            committed_before
            if committed_before and not fault(committed_before, list(stage_inputs.values()))
            else None
        )

    result = current()
    if result:
        return StageResult(stage.name, key, "current", time.monotonic() - clock, result)
    name = claim_name(stage.name, key)
    before = store.read_json(root, name)

    def claim(number: int) -> int:
        content = {
            "attempt": number,
            "config": config.model_dump(mode="json"),
            "inputs": {n: committed.key for n, committed in stage_inputs.items()},
        }

        def later(old: bytes | None) -> bytes | None:
            return (
                store.json_bytes(content)
                if old is None or json.loads(old)["attempt"] < number
                else None
            )

        claim_now = store.change_bytes(root, name, later)
        assert claim_now is not None, "where no claim was, ours is now"
        return int(json.loads(claim_now)["attempt"])

    wanted: StageResources = config.cluster.stages.get(stage.name) or default_resources(
        stage, config
    )
    job = Job(
        name=f"unclip-{stage.name}-{key}-{hashlib.sha256(root.uri.encode()).hexdigest()[:8]}",
        command=lambda number: shlex.join(
            [config.cluster.python, "-m", ENTRYPOINT, root.uri, stage.name, key, str(number)]
        ),
        attempts=config.cluster.attempts,
        cpus=wanted.cpus,
        gpus=wanted.gpus,
        memory_bytes=wanted.memory_bytes,
        labels=wanted.labels,
        runtime_env=runtime_env(config),
    )
    JobServer(address).run(
        job,
        before["attempt"] if before else 0,
        claim,
        lambda: current() is not None,
        lambda line: say(line),
    )
    result = current()
    assert result, "the job ends when the stage is current"
    store.remove(root, name)
    return StageResult(stage.name, key, "ran", time.monotonic() - clock, result)


def default_resources(stage: Stage, config: Any) -> StageResources:
    """Return what a stage's own process asks for: training, embedding and a spread download ask for their workers themselves.

    A download on one node asks for its processes, and so does a spread one whose sources are in part served on that node's loopback.
    """
    if stage.name == "ingest":
        is_here = not config.cluster.ingest_workers or any(
            source.kind != "urls" for source in config.data.sources
        )
        return StageResources(cpus=config.data.processes if is_here else 0)
    return StageResources(cpus=0 if stage.parameters or stage.name == "embed" else 1)


def runtime_env(config: Any) -> dict[str, Any]:
    """Return Ray's runtime environment: this code, unless the cluster's image holds it, and the variables that travel."""
    variables = {name: os.environ[name] for name in CARRIED if name in os.environ}
    variables |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    code = {"working_dir": str(CODE), "excludes": LEFT_OUT} if config.cluster.upload_code else {}
    return {**code, "env_vars": variables}
