"""Builds an index by autofaiss, in its own environment: python autofaiss_peer.py VECTORS.npy OUT.index BYTES CORES.

Prints one JSON object: processor seconds, its factory string and its own parameter string.
"""

import json
import sys
import time
from pathlib import Path

import faiss
import numpy as np
from autofaiss import build_index


def main() -> None:
    """Build and tell."""
    vectors, out, bound, cores = sys.argv[1:]
    faiss.omp_set_num_threads(int(cores))
    given = np.ascontiguousarray(np.load(vectors), np.float32)
    started = time.process_time()
    _, infos = build_index(
        given,
        index_path=out,
        index_infos_path=out + ".json",
        max_index_memory_usage=f"{int(bound)}B",
        current_memory_available="16G",
        nb_cores=int(cores),
        metric_type="ip",
        verbose=40,
    )
    took = time.process_time() - started
    assert infos is not None
    told = json.loads(Path(out + ".json").read_text())
    print(
        json.dumps(
            {"seconds": took, "key": infos.get("index_key", ""), "parameters": told.get("index_param", infos.get("index_param", ""))}
        )
    )


if __name__ == "__main__":
    main()
