"""The command `upsample`: enlarge image files with a run's up-samplers.

Reads image files and a run's up-samplers; writes a grid that compares them with interpolation, and
the single images.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.generate import (
    DrawingOptions,
    Seed,
    check_files,
    several,
    tell_pictures,
    upsampler_stages,
)
from flows.cli.option_groups import option_groups
from flows.config.roots import open_for
from infra.errors import CallerError
from infra.storage.stage_files import pinned_copy

if TYPE_CHECKING:
    import numpy as np

COLUMNS = ("small", "bicubic", "Lanczos", "up-sampler")
MAX_SIDE_PX = 4096
Side = Annotated[
    int | None,
    typer.Option(
        "--side",
        min=8,
        max=MAX_SIDE_PX,
        help="Side to which pictures are first resized, in pixels; by default the trained one.",
    ),
]


@option_groups
def upsample(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Small PNG, JPEG or WebP files.")
    ],
    side: Side = None,
    seed: Seed = 0,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, max=1000, help="Denoising steps; by default the recipe's."),
    ] = None,
    drawing: DrawingOptions = DrawingOptions(),
) -> None:
    """Enlarge pictures with the run's up-samplers, and compare with bicubic and Lanczos."""
    check_files(images)
    import numpy as np

    from flows.runs.records import find_run

    opened = open_for(drawing.root, for_writing=False)
    record = find_run(opened, drawing.run)
    stages = upsampler_stages(opened, record)
    from flows.images.png import write_grid
    from training.data.image_reader import read_file
    from training.generation.unclip import SEED_STRIDE
    from training.models import upsampler_cascade

    models = [upsampler_cascade.load(pinned_copy(committed.files)) for committed in stages.values()]
    first = models[0].config
    start = side or first.image_size_px // first.factor
    factor = int(np.prod([model.config.factor for model in models]))
    if start * factor > MAX_SIDE_PX:
        raise CallerError(f"--side {start}: {factor} times that is more than {MAX_SIDE_PX} pixels")
    small = np.stack([read_file(image, start) for image in images])
    seeds = [seed * SEED_STRIDE + number for number in range(len(small))]
    enlarged = upsampler_cascade.enlarge(models, small, seeds, steps)
    grid = np.stack([*_interpolations(small, factor), enlarged], 1)
    files = [image.name for image in images]
    settings = {"run": record["name"], "images": files, "steps": steps}
    settings |= {"side_px": start, "factor": factor}
    settings |= {stage: committed.key for stage, committed in stages.items()}
    name = f"upsample {several(images[0].stem, len(images))}"
    written = write_grid(grid, files, [*COLUMNS], name, seed, settings, drawing.out)
    tell_pictures(*written, seed, settings, drawing.as_json)


def _interpolations(small: "np.ndarray", factor: int) -> "list[np.ndarray]":
    """Return images (B, H, W, 3) enlarged by nearest neighbour and by every interpolation."""
    import numpy as np

    from training.generation import upsampling_eval

    names = upsampling_eval.INTERPOLATIONS
    nearest = np.kron(small, np.ones((1, factor, factor, 1), np.uint8))
    return [nearest, *(upsampling_eval.interpolate(small, factor, name) for name in names)]
