"""The commands that manipulate image files: `vary`, `interpolate`, `textdiff` and `reconstruct`.

They read the files (untrusted until training.data.image_reader has decoded them), load a run's
models, and write a labelled grid and its single images. The computation is in
training/generation/manipulations.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.generate import (
    DrawingOptions,
    Guidance,
    Seed,
    check_files,
    guidance_of,
    load_system,
    several,
    spoken,
    tell_pictures,
)
from flows.cli.option_groups import option_groups
from flows.config.roots import open_for
from infra.errors import CallerError
from infra.storage.stage_files import pinned_copy

if TYPE_CHECKING:
    import numpy as np

    from flows.images.latent_grids import Grid
    from infra.storage.manifests import Committed
    from training.generation.unclip import Unclip

Image = Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG, JPEG or WebP file.")]
Etas = Annotated[
    list[float] | None,
    typer.Option(
        "--eta",
        min=0,
        max=1,
        help="0 reproduces the picture, 1 varies most; may be repeated, one row each.",
    ),
]
Columns = Annotated[
    int, typer.Option("--columns", min=2, max=64, help="Pictures in a row, both ends included.")
]
NoiseRows = Annotated[
    int,
    typer.Option("--count", min=1, max=64, help="Rows, each with another noise for the decoder."),
]
SlerpNoise = Annotated[
    bool,
    typer.Option(
        "--slerp-noise",
        help="Draw one row and interpolate the noise as well; its ends are the pictures.",
    ),
]
Theta = Annotated[
    float,
    typer.Option(
        "--theta",
        min=0,
        max=1,
        help="How far to go, as a fraction of the angle; unCLIP: 0.25 to 0.5.",
    ),
]
PcaDims = Annotated[
    str,
    typer.Option(
        "--pca-dims",
        metavar="N,N,...",
        help="Numbers of principal components of z_i; those above its dimension are ignored.",
    ),
]
FIGURE_7 = "2,5,10,20,30,40,80,120,160,200,320"


@dataclass(frozen=True)
class InversionOptions:
    """Options of drawing an image again from its own latents; guidance None is the recipe's."""

    seed: Seed = 0
    steps: Annotated[
        int,
        typer.Option(
            "--steps", min=1, max=1000, help="DDIM steps, both down to noise and back up."
        ),
    ] = 25
    guidance: Guidance = None


@dataclass(frozen=True)
class Opened:
    """A run's models, and the images at the sizes used for encoding and for drawing."""

    model: "Unclip"
    guidance: float
    settings: dict[str, Any]
    """Steps, guidance, run name and stage keys, as stored in the written images."""
    stages: "dict[str, Committed]"
    pictures: "np.ndarray"  # uint8 (B, H, W, 3)
    drawn_pictures: "np.ndarray"  # uint8 (B, S, S, 3), at the decoder's side


@option_groups
def vary(
    image: Image,
    count: Annotated[int, typer.Option("--count", min=1, max=256, help="Variations in a row.")] = 6,
    eta: Etas = None,
    sampling: InversionOptions = InversionOptions(),
    drawing: DrawingOptions = DrawingOptions(),
) -> None:
    """Draw variations of a picture: same meaning, other details (unCLIP, figure 3)."""
    import numpy as np

    from flows.images.latent_grids import Grid
    from training.generation import manipulations

    opened = _open([image], drawing, sampling)
    model, guidance = opened.model, opened.guidance
    seed, steps = sampling.seed, sampling.steps
    latents = manipulations.invert(model, opened.pictures, steps, guidance)
    etas = eta or [1.0]
    rows = []
    for value in etas:
        variations = manipulations.vary(model, latents, value, count, seed, steps, guidance)
        rows.append(np.concatenate([opened.drawn_pictures, latents.rebuilt, variations]))
    labels = [f"{image.name}, eta = {value:g}" for value in etas]
    columns = ["the picture", "rebuilt", *(f"variation {number + 1}" for number in range(count))]
    settings = {"image": image.name, "eta": etas, "count": count, **opened.settings}
    figures = {"rebuilt_psnr_db": latents.psnr_db}
    grid = Grid(np.stack(rows), labels, columns)
    _finish(grid, f"vary {image.stem}", seed, settings, figures, drawing)


@option_groups
def interpolate(
    first: Annotated[Path, typer.Argument(metavar="A", help="The picture at the left end.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The picture at the right end.")],
    columns: Columns = 9,
    count: NoiseRows = 3,
    slerp_noise: SlerpNoise = False,
    sampling: InversionOptions = InversionOptions(),
    drawing: DrawingOptions = DrawingOptions(),
) -> None:
    """Blend the meaning of two pictures (unCLIP, figure 4).

    Interpolates their z_i by slerp, with the decoder's noise fixed along a row.
    """
    import numpy as np

    from flows.images.latent_grids import Grid
    from training.generation import manipulations

    opened = _open([first, second], drawing, sampling)
    model, guidance, figures = opened.model, opened.guidance, {}
    seed, steps = sampling.seed, sampling.steps
    if slerp_noise:
        latents = manipulations.invert(model, opened.pictures, steps, guidance)
        figures = {"rebuilt_psnr_db": latents.psnr_db}
        z_i = latents.z_i
        rows = [manipulations.interpolate(model, z_i, columns, seed, latents, steps, guidance)]
        labels = ["noise from A's to B's"]
    else:
        z_i = manipulations.embed(model, opened.pictures)
        rows = [
            manipulations.interpolate(model, z_i, columns, seed + row, None, steps, guidance)
            for row in range(count)
        ]
        labels = [f"noise of seed {seed + row}" for row in range(count)]
    left, right = opened.drawn_pictures[:1], opened.drawn_pictures[1:]
    images = np.stack([np.concatenate([left, row, right]) for row in rows])
    weights = [f"{number / (columns - 1):.2f}" for number in range(columns)]
    grid = Grid(images, labels, [f"A: {first.stem}", *weights, f"B: {second.stem}"])
    files = [first.name, second.name]
    settings = {"images": files, "columns": columns, "slerp_noise": slerp_noise, **opened.settings}
    name = f"interpolate {first.stem} {second.stem}{' noise' if slerp_noise else ''}"
    _finish(grid, name, seed, settings, figures, drawing)


@option_groups
def textdiff(
    image: Image,
    before: Annotated[str, typer.Argument(metavar="FROM", help='What it shows, or "a photo".')],
    after: Annotated[str, typer.Argument(metavar="TO", help="What it should become.")],
    theta: Theta = 0.5,
    columns: Annotated[
        int,
        typer.Option("--columns", min=2, max=64, help="Pictures from the rebuilt one to theta."),
    ] = 8,
    sampling: InversionOptions = InversionOptions(),
    drawing: DrawingOptions = DrawingOptions(),
) -> None:
    """Change a picture from one caption towards another (unCLIP, figure 5).

    Keeps the picture's noise from DDIM inversion.
    """
    before, after = spoken("textdiff", before), spoken("textdiff", after)
    if before == after:
        raise CallerError(
            f"textdiff: FROM and TO are both {before!r}: there is no difference to follow"
        )
    import numpy as np

    from flows.images.latent_grids import Grid
    from training.generation import manipulations

    opened = _open([image], drawing, sampling)
    model, guidance = opened.model, opened.guidance
    seed, steps = sampling.seed, sampling.steps
    latents = manipulations.invert(model, opened.pictures, steps, guidance)
    try:
        row = manipulations.text_diff(
            model, latents, (before, after), theta, columns, steps, guidance
        )
    except ValueError as error:
        raise CallerError(f"textdiff: {error}") from None
    images = np.concatenate([opened.drawn_pictures, row])[None]
    weights = [f"theta {weight:.2f}" for weight in np.linspace(0, theta, columns)]
    grid = Grid(images, [f"{image.name}: {before} -> {after}"], ["the picture", *weights])
    request = {"image": image.name, "from": before, "to": after, "theta": theta, "columns": columns}
    settings = request | opened.settings
    figures = {"rebuilt_psnr_db": latents.psnr_db}
    _finish(grid, f"textdiff {image.stem} {after}", seed, settings, figures, drawing)


@option_groups
def reconstruct(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="PNG, JPEG or WebP files; each is one row."),
    ],
    pca_dims: PcaDims = FIGURE_7,
    sampling: InversionOptions = InversionOptions(),
    drawing: DrawingOptions = DrawingOptions(),
) -> None:
    """Draw pictures from the first principal components of their z_i (unCLIP, figure 7)."""
    wanted = _dims(pca_dims)
    import numpy as np

    from flows.images.latent_grids import Grid
    from training.data import embedding_dataset
    from training.generation import manipulations
    from training.models.pca import Pca

    opened = _open(images, drawing, sampling, ("embed",))
    _, z_train = embedding_dataset.read(pinned_copy(opened.stages["embed"].files), "train")
    dims = [count for count in wanted if count <= z_train.dim]
    if not dims:
        raise CallerError(
            f"--pca-dims {pca_dims}: this run's z_i has {z_train.dim} dimensions, "
            "ask for that many at most"
        )
    model, pca = opened.model, Pca.fit(z_train[z_train.sampled()])
    z_i, seed = manipulations.embed(model, opened.pictures), sampling.seed
    drawn = manipulations.reconstruct(
        model, z_i, pca.to(model.device), dims, seed, sampling.steps, opened.guidance
    )
    held = (pca.eigenvalues.cumsum(0) / pca.eigenvalues.sum()).tolist()
    files = [file.name for file in images]
    columns = [f"{count} ({100 * held[count - 1]:.0f} %)" for count in dims]
    columns += [f"all {z_train.dim}", "the picture"]
    grid = Grid(np.concatenate([drawn, opened.drawn_pictures[:, None]], 1), files, columns)
    settings = {"images": files, "pca_dims": dims, **opened.settings}
    figures = {"variance_held": {str(count): round(held[count - 1], 4) for count in dims}}
    name = f"reconstruct {several(images[0].stem, len(images))}"
    _finish(grid, name, seed, settings, figures, drawing)


def _dims(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 100_000 for part in parts) or len(parts) > 64:
        raise CallerError(
            f"--pca-dims {text[:80]}: give up to 64 whole numbers from 1, with commas between them"
        )
    return sorted({int(part) for part in parts})


def _open(
    images: list[Path],
    drawing: DrawingOptions,
    sampling: InversionOptions,
    more: tuple[str, ...] = (),
) -> Opened:
    """Load the run's models and read the images, at the larger of the sides of CLIP and decoder.

    Raises CallerError for a missing file and for more steps than the decoder has.
    """
    check_files(images)
    from training.generation import manipulations

    opened = open_for(drawing.root, for_writing=False)
    model, record, stages = load_system(opened, drawing.run, more)
    steps, guidance = sampling.steps, guidance_of(model, sampling.guidance)
    if steps > model.decoder.schedule.T:
        raise CallerError(f"--steps {steps}: this decoder has {model.decoder.schedule.T}")
    pictures = manipulations.read(model, images)
    settings = {
        "steps": steps,
        "guidance": guidance,
        "run": record["name"],
        **{stage: committed.key for stage, committed in stages.items()},
    }
    drawn = manipulations.as_drawn(model, pictures)
    return Opened(model, guidance, settings, stages, pictures, drawn)


def _finish(
    grid: "Grid",
    name: str,
    seed: int,
    settings: dict[str, Any],
    figures: dict[str, Any],
    drawing: DrawingOptions,
) -> None:
    """Write the grid and its images to --out, and print what was written."""
    from flows.images.png import write_grid

    written = write_grid(grid.images, grid.rows, grid.columns, name, seed, settings, drawing.out)
    rebuilt = figures.get("rebuilt_psnr_db")
    note = f"; rebuilt at {', '.join(f'{value:.1f}' for value in rebuilt)} dB" if rebuilt else ""
    tell_pictures(*written, seed, settings, drawing.as_json, figures, note)
