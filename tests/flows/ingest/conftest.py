"""A Ray on this machine for the tests of one file."""

from collections.abc import Iterator

import pytest

from infra.compute.cluster import Cluster, ClusterConfig


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Cluster]:
    """Ray with two cores, which the runs of a test join and leave running."""
    with Cluster(ClusterConfig(num_cpus=2)) as cluster:
        cluster.start()
        yield cluster
