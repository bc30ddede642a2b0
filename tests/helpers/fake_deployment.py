"""A flow over the first fake stage, for a deployment: `tests.helpers.fake_deployment.run_fakes`,
which a worker starts as it starts the
real one.
"""

import os
from typing import Any

from prefect import flow

from flows.orchestration import ray_submit
from flows.pipeline import run_stages
from tests.helpers.fake_stages import FAKES, FakeConfig, FakeSection, fake_run


@flow(name="deployed-fakes", persist_result=False)
def run_fakes(root: str, jobs: str, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Hand the stage, which takes so many seconds, to the Ray job server at `jobs`, which the
    environment lets it into.
    """
    os.environ.update(environment)
    ray_submit.ENTRYPOINT = "tests.helpers.fake_job"
    config: Any = FakeConfig(data=FakeSection(seconds=seconds))
    config = config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"upload_code": False})}
    )
    return run_stages(fake_run(root, config, FAKES[:1]), jobs)
