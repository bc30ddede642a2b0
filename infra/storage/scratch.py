"""Path and maximum size of a ROOT's scratch folder on this node, from environment variables.

UNCLIP_SCRATCH is the base folder (default ~/.cache/unclip/scratch); each ROOT in a store has its
own folder below it. UNCLIP_SCRATCH_BYTES is the bound per ROOT on a node (default 20 GiB): a node
that uses two ROOTs may need twice as much disk. Every node reads its own environment, so nodes need
no shared folder.
"""

import hashlib
import os
import re
from pathlib import Path

from infra.errors import CallerError

FOLDER_VARIABLE, BYTES_VARIABLE = "UNCLIP_SCRATCH", "UNCLIP_SCRATCH_BYTES"
DEFAULT_BYTES = 20 << 30
SIZE = re.compile(r"(?P<number>[0-9]+)(?P<unit>[KMGT]?)(iB|B|i)?", re.IGNORECASE)
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def scratch_for(uri: str) -> Path | None:
    """Return this node's scratch folder for a ROOT in a store: copies and unfinished work.

    Returns None for a local ROOT, which contains its scratch folder.
    """
    if "://" not in uri or uri.startswith("file://"):
        return None
    base = Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "unclip" / "scratch")
    return base / hashlib.sha256(uri.rstrip("/").encode()).hexdigest()[:16]


def scratch_bytes() -> int:
    """Return the maximum size in bytes of the scratch folder of one ROOT on this node.

    Accepts bytes, or a number with K, M, G or T (powers of 1,024), such as 20G, 20Gi or 20GiB.
    Raises CallerError if the variable is not a size.
    """
    text = os.environ.get(BYTES_VARIABLE, "").strip()
    if not text:
        return DEFAULT_BYTES
    size = SIZE.fullmatch(text)
    if size is None or int(size["number"]) == 0:
        raise CallerError(
            f"{BYTES_VARIABLE}={text} is not a size: give bytes, or a number with K, M, G or T "
            "such as 20G"
        )
    return int(size["number"]) * UNITS[size["unit"].upper()]
