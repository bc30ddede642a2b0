"""Processes of tests, forked from one that has imported torch and ours: a fresh interpreter takes
seconds for it, each time.
"""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

PRELOADED = [
    "pytest",
    "tests.helpers.fake_stages",
    "tests.helpers.training_folders",
    "torch._dynamo",
]
"""There is one such process for all files of tests, so it imports for all of them."""


def together(
    function: Callable[..., None], arguments: tuple[Any, ...], workers: int, join: bool = True
) -> Any:
    """Call the function as `mp.spawn` does, with the worker's number first."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    return mp.start_processes(function, arguments, workers, join=join, start_method="forkserver")


def alone(function: Callable[..., None], *arguments: Any) -> int | None:
    """Call the function in a process of its own and return the exit code, minus the signal that
    ended it.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode
