"""Run one stage as a Ray job: `python -m flows.orchestration.ray_job ROOT STAGE KEY ATTEMPT`.

`flows/orchestration/ray_submit.py` starts it on the cluster. Reads its config and inputs from the
claim `ROOT/jobs/<stage>-<key>.json`. The claim is also the fence: an attempt that it does not name
commits nothing. Exit code 2 means that another attempt would fail as well, 3 that ROOT was
unavailable.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

from pydantic import with_config
from typing_extensions import TypedDict

import flows.orchestration.stages as stages
from flows.config.roots import scratch_for
from flows.orchestration.run_stage import run_stage
from flows.runs.stage import key_of
from infra.compute.cluster import SPIN_COUNT, Cluster
from infra.compute.ray_jobs import AWAY_EXIT, PERMANENT_EXIT
from infra.errors import PERMANENT, CallerError, StorageAwayError, UnclipError
from infra.storage import manifests, store
from infra.storage.store import Root, open_root
from infra.storage.typed_json import OPEN, JsonKind, Texts

if TYPE_CHECKING:  # its sections import torch and faiss
    from flows.config.run_config import RunConfig


@with_config(OPEN)
class Claim(TypedDict):
    """The content of a stage's claim."""

    attempt: int
    """The attempt that may commit."""
    config: dict[str, Any]
    """The whole resolved recipe."""
    inputs: Texts
    """Keys of the input folders by stage."""


CLAIMS = JsonKind(Claim, "the claim of a job", store.REMOVE, max_bytes=16 << 20)


def claim_name(stage: str, key: str) -> str:
    """Return the path of a stage's claim, relative to ROOT."""
    return f"jobs/{stage}-{key}.json"


def run(root: Root, stage_name: str, key: str, attempt: int) -> None:
    """Run one stage and commit it, unless a later attempt has claimed it meanwhile.

    Raises CallerError if this node sees other inputs or code than the submitting machine, and
    UnclipError if a later attempt has taken over.
    """
    claim = check_claim(root, stage_name, key, attempt)
    config = load(claim["config"])
    stage = next(candidate for candidate in stages.STAGES if candidate.name == stage_name)
    inputs = {}
    for name, input_key in claim["inputs"].items():
        committed = manifests.find(root, name, input_key)
        if committed is None:
            raise CallerError(
                f"{root.uri} has no {name}/{input_key} as seen from the cluster: "
                "ROOT must be a store that every node reaches"
            )
        inputs[name] = committed
    here = key_of(
        stage, config, {name: committed_input.key for name, committed_input in inputs.items()}
    )
    if here != key:
        raise CallerError(
            f"{stage_name} has the key {here} on the cluster but {key} where it was submitted: "
            "its sources or code differ"
        )
    with Cluster(config.cluster) as cluster:
        run_stage(
            stage,
            root,
            config,
            inputs,
            cluster,
            say,
            guard=lambda: check_claim(root, stage_name, key, attempt),
        )


def check_claim(root: Root, stage: str, key: str, attempt: int) -> Claim:
    """Return this attempt's claim.

    Raises UnclipError if a later attempt has claimed the stage, or if the stage is already done.
    """
    claim = CLAIMS.read(root, claim_name(stage, key))
    if claim is None or claim["attempt"] != attempt:
        later = f"attempt {claim['attempt']} has taken over" if claim else "its claim has gone"
        raise UnclipError(
            f"attempt {attempt} of {stage} {key} is fenced off, {later}: nothing is committed"
        )
    return claim


def load(config: dict[str, Any]) -> "RunConfig":
    """Return the submitted config, with the address of the cluster that this job runs on."""
    from flows.config.recipe_file import validated
    from flows.config.run_config import RunConfig

    resolved = validated(config, RunConfig, "the submitted recipe")
    return resolved.model_copy(
        update={"cluster": resolved.cluster.model_copy(update={"address": "auto"})}
    )


def say(line: str) -> None:
    """Print a line to the job's log, which the submitter shows."""
    print(line, flush=True)


def main(arguments: list[str]) -> int:
    """Run the stage that the arguments name and return the exit code."""
    uri, stage, key, attempt = arguments
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # before torch loads OpenMP
    try:
        run(open_root(uri, scratch_for(uri)), stage, key, int(attempt))
    except PERMANENT as error:
        kind = "" if isinstance(error, UnclipError) else f"{type(error).__name__}: "
        say(f"unclip: {kind}{' '.join(str(error).split())}")
        return PERMANENT_EXIT
    except UnclipError as error:
        say(f"unclip: {' '.join(str(error).split())}")
        return AWAY_EXIT if isinstance(error, StorageAwayError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
