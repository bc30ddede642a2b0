"""Read what a run wrote with other tools: `python examples/read_root.py ROOT`.

The keep list opens in pandas, the shards in webdataset, the index in FAISS; only the manifests say
which folders belong to the run.
"""

import json
import sys
from pathlib import Path

import faiss
import pandas as pd
import webdataset as wds


def main(root: Path) -> None:
    """Print the size of the keep list, one pair of the first shard, and the nearest of a vector."""
    record = json.loads(
        max((root / "runs").glob("*.json"), key=lambda p: p.stat().st_mtime).read_text()
    )
    folders = {}
    for stage, key in record["stages"].items():
        folder = root / stage / key
        prefix = json.loads((folder / "manifest.json").read_text()).get("prefix", "")
        folders[stage] = folder / prefix if prefix else folder

    keep = pd.read_parquet(folders["curate"] / "keep.parquet")
    print(f"{len(keep)} pairs are kept, by split: {keep['split'].value_counts().to_dict()}")

    shard = sorted((folders["ingest"] / "shards").glob("*.tar"))[0]
    pair = next(iter(wds.WebDataset(str(shard), shardshuffle=False)))
    names = sorted(name for name in pair if not name.startswith("_"))
    print(f"{shard.name} begins with {pair['__key__']}: {names}")

    index = faiss.read_index(str(folders["index"] / "image.index"))
    scores, rows = index.search(index.reconstruct(0).reshape(1, -1), 3)
    nearest = [(int(r), round(float(s), 3)) for r, s in zip(rows[0], scores[0], strict=True)]
    print(f"nearest to row 0: {nearest}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
