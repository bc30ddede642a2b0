"""`unclip serve` over the ROOT of tests.helpers.committed_root, whose CLIP is a function.

Run as a script with the arguments of `unclip serve`; the worker that it starts runs `worker`.
"""

import sys

from flows.cli import serve
from flows.cli.main import main
from indexing.service.state import Encoders
from tests.helpers.evaluation_run import encode_images, encode_texts


def worker() -> None:
    """Run the command line with the drawn CLIP."""
    serve.load_encoders = lambda run_lineage: Encoders(
        run_lineage.fingerprint, encode_texts, encode_images, 20
    )
    main()


if __name__ == "__main__":
    serve.START_WORKER = serve.START_WORKER.replace(
        "flows.cli.main import main", "tests.helpers.drawn_service import worker as main"
    )
    main(["serve", *sys.argv[1:]])
