"""Opens a ROOT, with its scratch folder from the environment variable UNCLIP_SCRATCH."""

import hashlib
import os
from pathlib import Path

from infra.storage.store import Root, open_root


def open_for(uri: str, for_writing: bool) -> Root:
    """Open a ROOT with its scratch folder, and check that it can be written if `for_writing`."""
    return open_root(uri, scratch_for(uri), for_writing)


def scratch_for(uri: str) -> Path | None:
    """Return the local folder for unfinished work and downloads of a ROOT in a store.

    It is below $UNCLIP_SCRATCH, by default ~/.cache/unclip/scratch. Return None for a local ROOT,
    which holds its own.
    """
    if "://" not in uri:
        return None
    base = Path(os.environ.get("UNCLIP_SCRATCH") or Path.home() / ".cache" / "unclip" / "scratch")
    return base / hashlib.sha256(uri.encode()).hexdigest()[:16]
