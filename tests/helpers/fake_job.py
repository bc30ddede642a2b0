"""The entrypoint of a Ray job over the fake stages: `python -m tests.helpers.fake_job ROOT STAGE
KEY ATTEMPT`.
"""

import sys
from typing import Any

import flows.orchestration.stages
from flows.orchestration import ray_job
from tests.helpers.fake_stages import FAKES, FakeConfig


def load(config: dict[str, Any]) -> FakeConfig:
    """Load the submitted fake sections."""
    return FakeConfig.model_validate(config)


if __name__ == "__main__":
    flows.orchestration.stages.STAGES = FAKES  # type: ignore[assignment]
    ray_job.load = load
    sys.exit(ray_job.main(sys.argv[1:]))
