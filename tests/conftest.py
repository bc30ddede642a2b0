"""What holds for all tests: nothing phones home, and the files that take longest start first."""

import os

import pytest

from tests.helpers.process_guard import pytest_configure  # noqa: F401  (a hook)

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # img2dataset's image library asks for its newest version at import

LONGEST = (
    *("test_schedule", "test_s3", "test_end_to_end", "test_jobs", "test_pipeline", "test_submit", "test_second_night"),
    *("test_ingest", "test_resume", "test_remote_workers", "test_vanished_runs", "test_replicas", "test_cluster", "test_stages"),
)
"""Where two processes share the files, one that comes last and takes minutes would leave the other without work."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first; all others stay in their order."""
    place = {f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
