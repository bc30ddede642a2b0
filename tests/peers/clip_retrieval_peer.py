"""Asks a service through clip-retrieval's own ClipClient: reads questions as JSON lines, answers
each with what the client returned.

Runs in the environment of tests/peers/clip_retrieval.txt. The package's own `__init__` imports its
server and indexer, which want another
FAISS and torch; the client's module is loaded without it.
"""

import importlib.util
import json
import sys
from types import ModuleType


def client_module() -> ModuleType:
    """Return clip_retrieval.clip_client."""
    found = importlib.util.find_spec("clip_retrieval")
    assert found is not None and found.submodule_search_locations
    package = ModuleType("clip_retrieval")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["clip_retrieval"] = package
    return importlib.import_module("clip_retrieval.clip_client")


def main() -> None:
    """Answer until stdin ends."""
    module = client_module()
    for line in sys.stdin:
        told = json.loads(line)
        client = module.ClipClient(
            **{
                **told["client"],
                "modality": module.Modality(told["client"].get("modality", "image")),
            }
        )
        print(json.dumps(client.query(**told["query"])), flush=True)


if __name__ == "__main__":
    main()
