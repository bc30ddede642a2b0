"""A process that meets others as one worker of a gloo group, and leaves without tripping over
gloo's threads.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


@contextmanager
def meeting(rank: int, workers: int, file: Path) -> Iterator[None]:
    """Be worker `rank` of `workers`, who meet over a file, for the body; with more than one worker
    the process ends after it.

    At an interpreter's end gloo's threads now and then abort it ("terminate called without an
    active exception"): the workers leave
    together, and without that end. An error of the body goes its usual way.
    """
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=workers)
    yield
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()
        os._exit(0)
