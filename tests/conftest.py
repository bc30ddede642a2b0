"""What holds for all tests: nothing phones home, and the files that take longest start first."""

import os

import pytest

from tests.helpers.process_guard import pytest_configure  # noqa: F401

os.environ.setdefault(
    "NO_ALBUMENTATIONS_UPDATE", "1"
)  # img2dataset's image library asks for its newest version at import

LONGEST = (
    *(
        "test_deployments",
        "test_s3",
        "test_end_to_end",
        "test_train",
        "test_pipeline",
        "test_ray_submit",
        "test_second_night",
    ),
    *(
        "test_ingest",
        "test_fsdp",
        "test_resume",
        "test_vanished_runs",
        "test_shard_task",
        "test_ray_serve",
        "test_cluster",
    ),
    *(
        "test_stages",
        "test_upsampler",
        "test_decoder",
        "test_swiss_roll",
        "test_shard_worker",
        "test_capacity_plan",
        "test_index",
    ),
)
"""Files that take longest start first: several processes share the files, and one that comes
last would run alone.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first; all others stay in their order."""
    rank = {f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
