"""Opens a ROOT, with its scratch folder from the environment variable UNCLIP_SCRATCH."""

from infra.storage.scratch import scratch_for
from infra.storage.store import Root, open_root


def open_for(uri: str, for_writing: bool) -> Root:
    """Open a ROOT with its scratch folder, and check that it can be written if `for_writing`."""
    return open_root(uri, scratch_for(uri), for_writing)
