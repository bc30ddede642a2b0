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
    Guidance,
    Out,
    Seed,
    check_files,
    guidance_of,
    load_system,
    several,
    spoken,
    tell_pictures,
)
from flows.cli.options import DEFAULT_ROOT, Json, RootUri, RunName
from flows.config.roots import open_for
from infra.errors import CallerError

if TYPE_CHECKING:
    import numpy as np

    from infra.storage.manifests import Committed
    from training.generation.unclip import Unclip

Steps = Annotated[
    int,
    typer.Option("--steps", min=1, max=1000, help="DDIM steps, both down to noise and back up."),
]
STEPS = 25
FIGURE_7 = "2,5,10,20,30,40,80,120,160,200,320"


@dataclass(frozen=True)
class Opened:
    """A run's models, and the images at the sizes used for encoding and for drawing."""

    model: "Unclip"
    settings: dict[str, Any]
    stages: "dict[str, Committed]"
    pictures: "np.ndarray"  # uint8 (B, H, W, 3)
    drawn_pictures: "np.ndarray"  # uint8 (B, S, S, 3), at the decoder's side


def vary(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG, JPEG or WebP file.")],
    count: Annotated[int, typer.Option("--count", min=1, max=256, help="Variations in a row.")] = 6,
    eta: Annotated[
        list[float] | None,
        typer.Option(
            "--eta",
            min=0,
            max=1,
            help="0 reproduces the picture, 1 varies most; may be repeated, one row each.",
        ),
    ] = None,
    seed: Seed = 0,
    steps: Steps = STEPS,
    guidance: Guidance = None,
    out: Out = Path("out"),
    root: RootUri = DEFAULT_ROOT,
    run: RunName = None,
    as_json: Json = False,
) -> None:
    """Draw variations of a picture: same meaning, other details (unCLIP, figure 3)."""
    import numpy as np

    from training.generation import manipulations

    opened = _open(root, run, [image], steps)
    guidance = guidance_of(opened.model, guidance)
    latents = manipulations.invert(opened.model, opened.pictures, steps, guidance)
    etas = eta or [1.0]
    rows = [
        np.concatenate(
            [
                opened.drawn_pictures,
                latents.rebuilt,
                manipulations.vary(opened.model, latents, eta, count, seed, steps, guidance),
            ]
        )
        for eta in etas
    ]
    columns = ["the picture", "rebuilt", *(f"variation {number + 1}" for number in range(count))]
    settings = {
        "image": image.name,
        "eta": etas,
        "count": count,
        "steps": steps,
        "guidance": guidance,
        **opened.settings,
    }
    labels = [f"{image.name}, eta = {eta:g}" for eta in etas]
    _finish(
        np.stack(rows),
        labels,
        columns,
        f"vary {image.stem}",
        seed,
        settings,
        {"rebuilt_psnr_db": latents.psnr_db},
        out,
        as_json,
    )


def interpolate(
    first: Annotated[Path, typer.Argument(metavar="A", help="The picture at the left end.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The picture at the right end.")],
    columns: Annotated[
        int, typer.Option("--columns", min=2, max=64, help="Pictures in a row, both ends included.")
    ] = 9,
    count: Annotated[
        int,
        typer.Option(
            "--count", min=1, max=64, help="Rows, each with another noise for the decoder."
        ),
    ] = 3,
    slerp_noise: Annotated[
        bool,
        typer.Option(
            "--slerp-noise",
            help="Draw one row and interpolate the noise as well; its ends are the pictures.",
        ),
    ] = False,
    seed: Seed = 0,
    steps: Steps = STEPS,
    guidance: Guidance = None,
    out: Out = Path("out"),
    root: RootUri = DEFAULT_ROOT,
    run: RunName = None,
    as_json: Json = False,
) -> None:
    """Blend the meaning of two pictures (unCLIP, figure 4).

    Interpolates their z_i by slerp, with the decoder's noise fixed along a row.
    """
    import numpy as np

    from training.generation import manipulations

    opened = _open(root, run, [first, second], steps)
    guidance = guidance_of(opened.model, guidance)
    model, figures = opened.model, {}
    if slerp_noise:
        latents = manipulations.invert(model, opened.pictures, steps, guidance)
        figures = {"rebuilt_psnr_db": latents.psnr_db}
        rows = [
            manipulations.interpolate(model, latents.z_i, columns, seed, latents, steps, guidance)
        ]
        labels = ["noise from A's to B's"]
    else:
        z_i = manipulations.embed(model, opened.pictures)
        rows = [
            manipulations.interpolate(model, z_i, columns, seed + row, None, steps, guidance)
            for row in range(count)
        ]
        labels = [f"noise of seed {seed + row}" for row in range(count)]
    ends = [[opened.drawn_pictures[:1], row, opened.drawn_pictures[1:]] for row in rows]
    heads = [
        f"A: {first.stem}",
        *(f"{number / (columns - 1):.2f}" for number in range(columns)),
        f"B: {second.stem}",
    ]
    settings = {
        "images": [first.name, second.name],
        "columns": columns,
        "slerp_noise": slerp_noise,
        "steps": steps,
        "guidance": guidance,
        **opened.settings,
    }
    name = f"interpolate {first.stem} {second.stem}{' noise' if slerp_noise else ''}"
    _finish(
        np.stack([np.concatenate(parts) for parts in ends]),
        labels,
        heads,
        name,
        seed,
        settings,
        figures,
        out,
        as_json,
    )


def textdiff(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG, JPEG or WebP file.")],
    before: Annotated[str, typer.Argument(metavar="FROM", help='What it shows, or "a photo".')],
    after: Annotated[str, typer.Argument(metavar="TO", help="What it should become.")],
    theta: Annotated[
        float,
        typer.Option(
            "--theta",
            min=0,
            max=1,
            help="How far to go, as a fraction of the angle; unCLIP: 0.25 to 0.5.",
        ),
    ] = 0.5,
    columns: Annotated[
        int,
        typer.Option("--columns", min=2, max=64, help="Pictures from the rebuilt one to theta."),
    ] = 8,
    seed: Seed = 0,
    steps: Steps = STEPS,
    guidance: Guidance = None,
    out: Out = Path("out"),
    root: RootUri = DEFAULT_ROOT,
    run: RunName = None,
    as_json: Json = False,
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

    from training.generation import manipulations

    opened = _open(root, run, [image], steps)
    guidance = guidance_of(opened.model, guidance)
    latents = manipulations.invert(opened.model, opened.pictures, steps, guidance)
    try:
        row = manipulations.text_diff(
            opened.model, latents, before, after, theta, columns, steps, guidance
        )
    except ValueError as error:
        raise CallerError(f"textdiff: {error}") from None
    heads = ["the picture", *(f"theta {weight:.2f}" for weight in np.linspace(0, theta, columns))]
    settings = {
        "image": image.name,
        "from": before,
        "to": after,
        "theta": theta,
        "columns": columns,
        "steps": steps,
        "guidance": guidance,
        **opened.settings,
    }
    name, label = f"textdiff {image.stem} {after}", f"{image.name}: {before} -> {after}"
    images = np.concatenate([opened.drawn_pictures, row])[None]
    _finish(
        images,
        [label],
        heads,
        name,
        seed,
        settings,
        {"rebuilt_psnr_db": latents.psnr_db},
        out,
        as_json,
    )


def reconstruct(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="PNG, JPEG or WebP files; each is one row."),
    ],
    pca_dims: Annotated[
        str,
        typer.Option(
            "--pca-dims",
            metavar="N,N,...",
            help="Numbers of principal components of z_i; those above its dimension are ignored.",
        ),
    ] = FIGURE_7,
    seed: Seed = 0,
    steps: Steps = STEPS,
    guidance: Guidance = None,
    out: Out = Path("out"),
    root: RootUri = DEFAULT_ROOT,
    run: RunName = None,
    as_json: Json = False,
) -> None:
    """Draw pictures from the first principal components of their z_i (unCLIP, figure 7)."""
    wanted = _dims(pca_dims)
    import numpy as np

    from training.data import embedding_dataset
    from training.generation import manipulations
    from training.models.pca import Pca

    opened = _open(root, run, images, steps, ("embed",))
    guidance = guidance_of(opened.model, guidance)
    _, z_train = embedding_dataset.read(opened.stages["embed"].local(), "train")
    dims = [count for count in wanted if count <= z_train.dim]
    if not dims:
        raise CallerError(
            f"--pca-dims {pca_dims}: this run's z_i has {z_train.dim} dimensions, "
            "ask for that many at most"
        )
    pca, z_i = (
        Pca.fit(z_train[z_train.sampled()]),
        manipulations.embed(opened.model, opened.pictures),
    )
    drawn = manipulations.reconstruct(
        opened.model, z_i, pca.to(opened.model.device), dims, seed, steps, guidance
    )
    held = (pca.eigenvalues.cumsum(0) / pca.eigenvalues.sum()).tolist()
    columns = [
        *(f"{count} ({100 * held[count - 1]:.0f} %)" for count in dims),
        f"all {z_train.dim}",
        "the picture",
    ]
    settings = {
        "images": [file.name for file in images],
        "pca_dims": dims,
        "steps": steps,
        "guidance": guidance,
        **opened.settings,
    }
    grid = np.concatenate([drawn, opened.drawn_pictures[:, None]], 1)
    figures = {"variance_held": {str(count): round(held[count - 1], 4) for count in dims}}
    name = f"reconstruct {several(images[0].stem, len(images))}"
    _finish(
        grid, [file.name for file in images], columns, name, seed, settings, figures, out, as_json
    )


def _dims(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 100_000 for part in parts) or len(parts) > 64:
        raise CallerError(
            f"--pca-dims {text[:80]}: give up to 64 whole numbers from 1, with commas between them"
        )
    return sorted({int(part) for part in parts})


def _open(
    root: str, run: str | None, images: list[Path], steps: int, more: tuple[str, ...] = ()
) -> Opened:
    """Load the run's models and read the images, at the larger of the sides of CLIP and decoder."""
    check_files(images)
    from training.generation import manipulations

    opened = open_for(root, for_writing=False)
    model, record, stages = load_system(opened, run, more)
    if steps > model.decoder.schedule.T:
        raise CallerError(f"--steps {steps}: this decoder has {model.decoder.schedule.T}")
    pictures = manipulations.read(model, images)
    settings = {
        "run": record["name"],
        **{stage: committed.key for stage, committed in stages.items()},
    }
    return Opened(model, settings, stages, pictures, manipulations.as_drawn(model, pictures))


def _finish(
    images: "np.ndarray",
    rows: list[str],
    columns: list[str],
    name: str,
    seed: int,
    settings: dict[str, Any],
    figures: dict[str, Any],
    out: Path,
    as_json: bool,
) -> None:
    from flows.images.png import write_grid

    written = write_grid(images, rows, columns, name, seed, settings, out)
    rebuilt = figures.get("rebuilt_psnr_db")
    note = f"; rebuilt at {', '.join(f'{value:.1f}' for value in rebuilt)} dB" if rebuilt else ""
    tell_pictures(*written, seed, settings, as_json, figures, note)
