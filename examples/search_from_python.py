"""Search a run's index from Python: `python examples/search_from_python.py ROOT KEY`.

Prints the samples nearest to the one with that key. `view.search` takes any unit vector of the
run's CLIP; rows that were taken down are never returned.
"""

import sys

from flows.config.roots import open_for
from flows.live_index.lineage import open_view


def main(uri: str, key: str) -> None:
    """Print the five samples nearest to a sample, itself included."""
    view, _ = open_view(open_for(uri, for_writing=False), None)
    hit = view.find_key(key)
    if hit is None:
        raise SystemExit(f"{uri} has no sample with the key {key}")
    for near in view.search(view.vector(hit), 5):
        print(f"{near.score:.3f}  {near.facts['key']}  {near.facts['caption']}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
