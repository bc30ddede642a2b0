"""Run a stage on a Ray cluster as a job whose id depends only on ROOT and the stage's key.

The submitting driver only waits, shows the job's log and reads manifests, so it may die and be
restarted, also on another machine. The claim below `ROOT/jobs/` names the attempt that may commit
(`flows/orchestration/ray_job.py`) and is removed when the stage is committed.
"""

import hashlib
import os
import shlex
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.orchestration.run_stage import target_of
from flows.runs.planning import find_current
from flows.runs.stage import Stage, StageResult
from infra.compute.cluster import StageResources
from infra.compute.ray_jobs import Job, JobServer
from infra.storage import store
from infra.storage.manifests import Committed
from infra.storage.store import Root

if TYPE_CHECKING:  # its sections import torch and faiss
    from flows.config.run_config import RunConfig

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
CARRIED = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "OMP_NUM_THREADS")
"""Environment variables passed to a job. No secrets, which Ray stores and shows; no scratch folder,
which is that of the node."""


def submit_stage(
    stage: Stage,
    root: Root,
    config: "RunConfig",
    inputs: Mapping[str, Committed],
    address: str,
    say: Callable[[str], None],
) -> StageResult:
    """Run one stage as a job on the cluster with the job server `address`, unless it is current.

    The counterpart of `run_stage.run_stage`; returns the same result.
    """
    from flows.orchestration.ray_job import CLAIMS, claim_name

    clock = time.monotonic()
    target = target_of(root, config, stage, inputs)
    key = target.key
    find_output = partial(find_current, root, stage.name, key, list(target.inputs.values()))
    committed = target.frozen or find_output()
    if committed:
        return StageResult(stage.name, key, "current", time.monotonic() - clock, committed)
    name = claim_name(stage.name, key)
    before = CLAIMS.read(root, name)
    input_keys = {name: committed_input.key for name, committed_input in target.inputs.items()}
    content = {"config": config.model_dump(mode="json"), "inputs": input_keys}
    JobServer(address).run(
        _job(stage, root, config, key),
        before["attempt"] if before else 0,
        partial(_claim, root, name, content),
        lambda: find_output() is not None,
        say,
    )
    committed = find_output()
    assert committed, "the job ends when the stage is current"
    store.remove(root, name)
    return StageResult(stage.name, key, "ran", time.monotonic() - clock, committed)


def _claim(root: Root, name: str, content: Mapping[str, Any], attempt: int) -> int:
    """Claim the stage for an attempt, unless a later one has it; return the attempt that has it."""
    claim = {"attempt": attempt, **content}

    def change(old: bytes | None) -> bytes | None:
        is_earlier = old is None or _attempt(root, name, old) < attempt
        return store.json_bytes(claim) if is_earlier else None

    claim_now = store.change_bytes(root, name, change)
    assert claim_now is not None, "where no claim was, ours is now"
    return _attempt(root, name, claim_now)


def _attempt(root: Root, name: str, data: bytes) -> int:
    from flows.orchestration.ray_job import CLAIMS

    return CLAIMS.parse(data, store.uri_of(root, name))["attempt"]


def _job(stage: Stage, root: Root, config: "RunConfig", key: str) -> Job:
    """Return the job that runs the stage, with its name, resources and environment."""
    resources: StageResources = config.cluster.stages.get(stage.name) or default_resources(
        stage, config
    )
    command = [config.cluster.python, "-m", ENTRYPOINT, root.uri, stage.name, key]
    return Job(
        name=f"unclip-{stage.name}-{key}-{hashlib.sha256(root.uri.encode()).hexdigest()[:8]}",
        command=lambda attempt: shlex.join([*command, str(attempt)]),
        attempts=config.cluster.attempts,
        cpus=resources.cpus,
        gpus=resources.gpus,
        memory_bytes=resources.memory_bytes,
        labels=resources.labels,
        runtime_env=runtime_env(config),
    )


def default_resources(stage: Stage, config: "RunConfig") -> StageResources:
    """Return the resources of a stage's driver process.

    Downloads, training and embedding request what their tasks and workers need themselves. Only
    tasks that download what is served on the driver's loopback run on its node, where it reserves
    their cores.
    """
    if stage.name == "ingest":
        is_serving = any(source.kind != "urls" for source in config.data.sources)
        at_once = config.cluster.ingest_workers or config.data.processes
        return StageResources(cpus=at_once if is_serving else 0)
    return StageResources(cpus=0 if stage.parameters or stage.name == "embed" else 1)


def runtime_env(config: "RunConfig") -> dict[str, Any]:
    """Return Ray's runtime environment: environment variables and, unless disabled, this code."""
    variables = {name: os.environ[name] for name in CARRIED if name in os.environ}
    variables |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    code = {"working_dir": str(CODE), "excludes": LEFT_OUT} if config.cluster.upload_code else {}
    return {**code, "env_vars": variables}
