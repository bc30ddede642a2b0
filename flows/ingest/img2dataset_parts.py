"""The parts of img2dataset that make shards, imported without what only its command line needs.

That is Ray and pandas (img2dataset.main), wandb, webdataset's use of torch, and albumentations,
of which four transforms are used (`flows/ingest/resize_transforms.py`): five sixths of the time
that the import takes. The stand-ins are in place only while this module is imported, and what was
imported against them is forgotten, so that the same process can import all of it normally later.
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
    """Put stand-ins in the place of modules that this process has not imported, while a block runs.

    A package that is imported inside is no longer in `sys.modules` afterwards.
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
