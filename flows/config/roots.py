"""Opens a ROOT for a command, with its scratch folder from the environment ($UNCLIP_SCRATCH)."""

from infra.storage.scratch import scratch_for
from infra.storage.store import Root, open_root


def open_for(uri: str, for_writing: bool) -> Root:
    """Open ROOT; one that is not local keeps unfinished work and downloads in $UNCLIP_SCRATCH, by
    default below ~/.cache/unclip.
    """
    return open_root(uri, scratch_for(uri), for_writing)
