"""The parts of img2dataset that write shards, imported without its slow dependencies.

Stand-ins replace Ray and pandas (img2dataset.main), wandb, torch (in webdataset) and albumentations
(only four transforms are used: `flows/ingest/resize_transforms.py`), which take five sixths of the
import time. The stand-ins exist only while this module is imported. Modules that were imported with
them are removed from `sys.modules`, so that the process can import the real ones later.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import cast

import flows.ingest.resize_transforms as resize_transforms

STAND_INS = cast(
    dict[str, ModuleType],
    {
        "img2dataset.main": SimpleNamespace(main=None, download=None),
        "wandb": SimpleNamespace(),
        "torch": None,
        "albumentations": resize_transforms,
    },
)
IMPORTED_WITH_THEM = ("img2dataset", "webdataset")


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Replace modules that this process has not imported by stand-ins while the block runs.

    Packages that the block imports with stand-ins are removed from `sys.modules` afterwards.
    """
    before = set(sys.modules)
    absent = {name: module for name, module in STAND_INS.items() if name not in sys.modules}
    sys.modules |= absent
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name in absent or name.partition(".")[0] in IMPORTED_WITH_THEM:
                del sys.modules[name]


with _stand_ins():
    from img2dataset import downloader as downloader
    from img2dataset.resizer import Resizer as Resizer
    from img2dataset.writer import WebDatasetSampleWriter as WebDatasetSampleWriter
