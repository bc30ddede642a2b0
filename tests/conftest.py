"""What holds for all tests: nothing phones home, and two processes share them, so that what waits for Ray waits beside the rest."""

import os

import pytest

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # img2dataset's image library asks for its newest version at import

SLOW = "slow"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with a slow test into one group and every other file into its own: under `-n 2 --dist loadgroup` (`make test`) one process
    takes the slow ones, one after the other since they start clusters and servers, and the other the rest.
    """
    slow = {item.path for item in items if item.get_closest_marker(SLOW)}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(SLOW if item.path in slow else item.path.stem))
