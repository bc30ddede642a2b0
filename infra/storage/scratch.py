"""The scratch folder of one ROOT on this node: where it is and how much it may take.

UNCLIP_SCRATCH names the parent folder (default ~/.cache/unclip/scratch), in which every ROOT that
is not local has a folder of its own. UNCLIP_SCRATCH_BYTES bounds each of those folders (default
20 GiB), so two ROOTs on one node may take twice as much. Every node reads its own environment, so
nodes need no folder in common.
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
    """Return this node's folder for copies and unfinished work of a ROOT that is not local.

    None for a local ROOT, which holds its own.
    """
    if "://" not in uri or uri.startswith("file://"):
        return None
    base = Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "unclip" / "scratch")
    return base / hashlib.sha256(uri.rstrip("/").encode()).hexdigest()[:16]


def scratch_bytes() -> int:
    """Return how many bytes the scratch folder of one ROOT may take on this node.

    Accepts bytes, or a number with K, M, G or T (powers of 1,024), such as 20G, 20Gi or 20GiB.
    Raises CallerError.
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
