"""Builds an index by autofaiss, in its own environment: python autofaiss_peer.py VECTORS.npy
OUT.index BYTES CORES.

Prints one JSON object: processor and wall seconds, its factory string and its own parameter string.
An index that is there already is not
built again, only its parameters are chosen anew: autofaiss takes the best recall that a query has
time for, so they are this moment's.
"""

import json
import sys
import time
from pathlib import Path

import faiss
import numpy as np
from autofaiss import build_index
from autofaiss.external.optimize import get_optimal_hyperparameters

QUERY_MS = 10.0
"""autofaiss's own default."""


def main() -> None:
    """Build, or choose the parameters of what was built, and tell."""
    vectors, out, bound, cores = sys.argv[1:]
    faiss.omp_set_num_threads(int(cores))
    facts = Path(out + ".built")
    if facts.exists():
        told = json.loads(facts.read_text())
        parameters = get_optimal_hyperparameters(
            faiss.read_index(out), told["key"], max_speed_ms=QUERY_MS
        )
    else:
        given = np.ascontiguousarray(np.load(vectors), np.float32)
        started, clock = time.process_time(), time.perf_counter()
        _, infos = build_index(
            given,
            index_path=out,
            index_infos_path=out + ".json",
            max_index_memory_usage=f"{int(bound)}B",
            current_memory_available="16G",
            nb_cores=int(cores),
            metric_type="ip",
            max_index_query_time_ms=QUERY_MS,
            verbose=40,
        )
        assert infos is not None
        told = {
            "seconds": time.process_time() - started,
            "wall_s": time.perf_counter() - clock,
            "key": infos["index_key"],
        }
        facts.write_text(json.dumps(told))
        parameters = json.loads(Path(out + ".json").read_text())["index_param"]
    print(json.dumps({**told, "parameters": parameters}))


if __name__ == "__main__":
    main()
