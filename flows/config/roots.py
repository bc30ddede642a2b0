"""Opens a ROOT for a command, with its scratch folder from the environment ($UNCLIP_SCRATCH)."""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from infra.storage.store import Root, open_root

if TYPE_CHECKING:  # its sections import torch and faiss
    pass


def open_for(uri: str, for_writing: bool) -> Root:
    """Open ROOT; one that is not local keeps unfinished work and downloads in $UNCLIP_SCRATCH, by
    default below ~/.cache/unclip.
    """
    return open_root(uri, scratch_for(uri), for_writing)


def scratch_for(uri: str) -> Path | None:
    """Return the local folder for unfinished work of a ROOT that is not local; None for one that
    is, which holds its own.
    """
    if "://" not in uri:
        return None
    base = Path(os.environ.get("UNCLIP_SCRATCH") or Path.home() / ".cache" / "unclip" / "scratch")
    return base / hashlib.sha256(uri.encode()).hexdigest()[:16]
