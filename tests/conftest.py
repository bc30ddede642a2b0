"""What holds for all tests: nothing phones home, and the files that take longest start first."""

import os

import pytest

from tests.helpers.process_guard import pytest_configure  # noqa: F401

os.environ.setdefault(
    "NO_ALBUMENTATIONS_UPDATE", "1"
)  # img2dataset's image library asks for its newest version at import

LONGEST = (
    "test_deployments",
    "test_s3",
    "test_end_to_end",
    "test_train",
    "test_ray_submit",
    "test_pipeline",
    "test_ingest",
    "test_open_clip_format",
    "test_train_in_store",
    "test_shard_task",
    "test_resume",
    "test_fsdp",
    "test_cluster",
    "test_vanished_runs",
    "test_docs",
    "test_shard_worker",
    "test_ray_serve",
    "test_index",
    "test_ingest_s3",
    "test_host_limits",
    "test_leftovers",
    "test_second_night",
    "test_stages",
    "test_collectives",
    "test_decoder",
    "test_upsampler",
    "test_swiss_roll",
    "test_capacity_plan",
    "test_clip_retrieval",
    "test_prefect_server",
)
"""Files that take longest start first: several processes share the files, and one that comes
last would run alone.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first; all others stay in their order."""
    rank = {f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
