"""Runs an ingest in a local ROOT up to its commit, for tests and benchmarks."""

from pathlib import Path
from typing import Any

from flows.ingest import ingest
from flows.sources.url_table import DataConfig
from infra.compute.cluster import Cluster, ClusterConfig
from infra.storage import store
from infra.storage.stage_output import StageOutput, open_output


def output_in(folder: Path) -> StageOutput:
    """Return the output of the ingest in the local ROOT `folder`."""
    return open_output(store.open_root(str(folder)), "ingest", "key")


def local_ingest(config: DataConfig, folder: Path, **cluster: Any) -> dict[str, Any]:
    """Run an ingest in the ROOT `folder`, up to its commit; return the counts.

    All its files are in `output_in(folder).folder` then. A second call goes on as a second attempt.
    """
    output = output_in(folder)
    out, work = folder / "out", folder / output.work
    for path in (out, work):
        path.mkdir(parents=True, exist_ok=True)
    with Cluster(ClusterConfig(**cluster)) as ray:
        counts = ingest.run(config, ray, output, out, work)
    output.put_tree(out)
    return counts
