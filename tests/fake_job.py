"""The entrypoint of a Ray job over the fake stages: `python -m tests.fake_job ROOT STAGE KEY ATTEMPT`."""

import sys
from typing import Any

import flows.stages
from flows import stage_job
from tests.fakes import FAKES, FakeConfig


def load(config: dict[str, Any]) -> FakeConfig:
    """Load the submitted fake sections."""
    return FakeConfig.model_validate(config)


if __name__ == "__main__":
    flows.stages.STAGES = FAKES  # type: ignore[assignment]
    stage_job.load = load
    sys.exit(stage_job.main(sys.argv[1:]))
