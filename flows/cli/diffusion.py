"""The commands `diffusion ...`: the lecture's pictures of the Swiss roll and of a run's decoder.

`swiss_roll` needs no ROOT; the others load a run's models and read the user's image files, or
held-out images of the run. All write only to the folder --out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.generate import (
    DrawingOptions,
    Guidance,
    Seed,
    guidance_of,
    load_system,
    spoken,
    tell_pictures,
)
from flows.cli.option_groups import option_groups
from flows.cli.options import Json, print_json
from flows.config.roots import open_for
from infra.errors import CallerError
from infra.storage.shard_reader import ShardReader
from infra.storage.stage_files import pinned_copy

if TYPE_CHECKING:
    from flows.images.latent_grids import Grid
    from infra.storage.manifests import Committed
    from training.generation.reconstruction import Described
    from training.generation.unclip import Unclip

Images = Annotated[
    list[Path] | None,
    typer.Argument(metavar="IMAGE...", help="Pictures; by default held-out ones of the run."),
]
TwoImages = Annotated[
    list[Path] | None,
    typer.Argument(metavar="A B", help="Two pictures; by default held-out ones of the run."),
]
Columns = Annotated[
    int, typer.Option("--columns", min=2, max=64, help="Blends in a row, both ends included.")
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        max=100_000,
        help="Sampler steps from T to 0, by default 100; a start at t uses its share of them.",
    ),
]
Times = Annotated[
    list[int] | None,
    typer.Option(
        "--t", min=1, help="Start time t; may be repeated. By default 25, 50 and 75 % of T."
    ),
]
Conditioned = Annotated[
    bool,
    typer.Option(
        "--told",
        help="Condition the decoder on the pictures' CLIP embeddings; by default unconditional.",
    ),
]
SHARES = (0.25, 0.5, 0.75)
STEPS = 100


@dataclass(frozen=True)
class LatentOptions:
    """Options of sampling from an x_t."""

    seed: Seed = 0
    steps: Steps = None


def swiss_roll(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the picture goes.")
    ] = Path("out"),
    steps: Annotated[
        int, typer.Option("--steps", min=1, max=1_000_000, help="Training steps.")
    ] = 4000,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="The same seed gives the same figures.")
    ] = 0,
    rates: Annotated[
        list[float] | None,
        typer.Option(
            "--rate",
            min=0.001,
            max=0.9999,
            help="Diffusion rate, the beta of every step; may be repeated. "
            "By default 0.02 to 0.9999, a map in one step.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train on the two-dimensional Swiss roll, and sample it at several rates and step counts."""
    from training.diffusion import swiss_roll as roll

    result = roll.swiss_roll(out, steps, seed=seed, rates=rates or ())
    if as_json:
        print_json(result)
        return
    distance = result["energy_distance"]
    print(f"energy distance  {distance:9.5f}   to fresh data, DPM-Solver++ in 50 steps")
    print(f"data to data     {result['data_to_data']:9.5f}   between two samples of the data")
    print(f"training         {result['seconds']:9.1f} s {result['steps']:,} steps")
    for row in result["by_rate"]:
        distance, steps = row["energy_distance"], row["steps"]
        print(f"rate {row['rate']:<12g}{distance:9.5f}   ancestral, {steps:,} steps")
    print(f"picture          {result['picture']}")


@option_groups
def across_time(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="What to draw; two rows each.")
    ],
    columns: Annotated[
        int, typer.Option("--columns", min=2, max=64, help="Times shown, both ends included.")
    ] = 9,
    sampling: LatentOptions = LatentOptions(),
    guidance: Guidance = None,
    drawing: DrawingOptions = DrawingOptions(),
) -> None:
    """Show generation over time: x_t and the decoder's prediction of x_0 (DDPM, figure 6)."""
    prompts = [spoken("across-time", prompt) for prompt in prompts]
    model, steps, settings, _ = _open(drawing, sampling)
    guidance = guidance_of(model, guidance)
    if columns > steps + 1:
        raise CallerError(f"--columns {columns}: {steps} steps have {steps + 1} times at most")
    from flows.images import latent_grids
    from training.generation import latents

    seed = sampling.seed
    frames = latents.across_time(model, prompts, columns, steps, seed, guidance)
    settings = {
        "prompts": prompts,
        "times": frames.times,
        "steps": steps,
        "guidance": guidance,
        **settings,
    }
    _finish(
        latent_grids.across_time(frames, prompts),
        f"across time {prompts[0]}",
        seed,
        settings,
        {},
        drawing,
    )


@option_groups
def shared_latents(
    images: Images = None,
    count: Annotated[
        int,
        typer.Option("--count", min=1, max=64, help="Held-out pictures if there is no IMAGE."),
    ] = 4,
    times: Times = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, max=64, help="Samples from each x_t.")
    ] = 3,
    is_conditioned: Conditioned = False,
    sampling: LatentOptions = LatentOptions(),
    drawing: DrawingOptions = DrawingOptions(),
) -> None:
    """Draw several samples from one x_t of a picture (DDPM, figure 7).

    The smaller t is, the more the samples share.
    """
    model, steps, settings, stages = _open(drawing, sampling, not images)
    seed, chosen = sampling.seed, _times(model, times)
    pictures = _pictures(model, images or [], stages, count, seed)
    from flows.images import latent_grids
    from training.generation import latents

    condition = pictures.z_i if is_conditioned else None
    shared = latents.sharing(model.decoder, pictures.x_0, chosen, samples, steps, seed, condition)
    distances = zip(chosen, shared.between_samples_rms, shared.to_image_rms, strict=True)
    figures = {
        "rms": [
            {"t": t, "between_samples": round(apart, 3), "to_picture": round(from_picture, 3)}
            for t, apart, from_picture in distances
        ]
    }
    settings = {
        "pictures": pictures.keys,
        "times": chosen,
        "samples": samples,
        "is_told": is_conditioned,
        "steps": steps,
        **settings,
    }
    grid = latent_grids.shared(shared, pictures, chosen)
    _finish(grid, f"shared latents {pictures.captions[0]}", seed, settings, figures, drawing)


@option_groups
def interpolate(
    images: TwoImages = None,
    count: Annotated[
        int,
        typer.Option("--count", min=1, max=32, help="Held-out pairs if there is no picture."),
    ] = 1,
    times: Times = None,
    columns: Columns = 9,
    is_conditioned: Conditioned = False,
    sampling: LatentOptions = LatentOptions(),
    drawing: DrawingOptions = DrawingOptions(),
) -> None:
    """Blend two pictures in x_t space and denoise the blends (DDPM, figure 8).

    `unclip interpolate` blends their meaning instead.
    """
    if images and len(images) != 2:
        raise CallerError(
            f"interpolate: {len(images)} picture{'s' if len(images) > 1 else ''} given: "
            "give two, or none for held-out ones"
        )
    model, steps, settings, stages = _open(drawing, sampling, not images)
    seed, chosen = sampling.seed, _times(model, times)
    pictures = _pictures(model, images or [], stages, 2 * count, seed)
    if len(pictures) < 2:
        raise CallerError("interpolate: this run holds out one concept only: give A and B")
    from flows.images import latent_grids
    from training.generation import latents

    first, second = pictures.halves()
    condition = (first.z_i, second.z_i) if is_conditioned else None
    blends = latents.interpolation(
        model.decoder, (first.x_0, second.x_0), chosen, columns, steps, seed, condition
    )
    settings = {
        "pictures": [first.keys, second.keys],
        "times": chosen,
        "columns": columns,
        "is_told": is_conditioned,
        "steps": steps,
        **settings,
    }
    grid = latent_grids.interpolation(blends, first, second, chosen)
    name = f"x_t {first.captions[0]} to {second.captions[0]}"
    _finish(grid, name, seed, settings, {}, drawing)


def _open(
    drawing: DrawingOptions, sampling: LatentOptions, wants_held_out: bool = False
) -> "tuple[Unclip, int, dict[str, Any], dict[str, Committed]]":
    """Load a run's models; return them, the steps, the PNG's settings and the stage folders."""
    more = ("ingest", "embed") if wants_held_out else ()
    opened = open_for(drawing.root, for_writing=False)
    model, record, stages = load_system(opened, drawing.run, more)
    T = model.decoder.schedule.T
    steps = sampling.steps
    if steps and steps > T:
        raise CallerError(f"--steps {steps}: this decoder has {T}")
    settings = {
        "run": record["name"],
        **{stage: committed.key for stage, committed in stages.items()},
    }
    return model, steps or min(STEPS, T), settings, stages


def _times(model: "Unclip", times: list[int] | None) -> list[int]:
    from training.generation.latents import times_at

    schedule = model.decoder.schedule
    beyond = [t for t in times or [] if t > schedule.T]
    if beyond:
        raise CallerError(f"--t {beyond[0]}: this decoder's times are 1 to {schedule.T}")
    return sorted(set(times)) if times else times_at(schedule, SHARES)


def _pictures(
    model: "Unclip", files: list[Path], stages: "dict[str, Committed]", count: int, seed: int
) -> "Described":
    """Read the user's images, or select `count` held-out ones by the seed."""
    from training.generation import reconstruction

    if files:
        return reconstruction.read_files(model, files)
    shards = ShardReader(stages["ingest"].files)
    side_px = model.decoder.config.image_size_px
    figures_read = reconstruction.read(
        pinned_copy(stages["embed"].files),
        shards,
        "held_out_concept",
        model.tokenizer,
        side_px,
        count,
        seed,
    )
    if not len(figures_read):
        raise CallerError("this run holds out no concept: give pictures of your own")
    return figures_read


def _finish(
    grid: "Grid",
    name: str,
    seed: int,
    settings: dict[str, Any],
    figures: dict[str, Any],
    drawing: DrawingOptions,
) -> None:
    from flows.images.png import write_grid

    written = write_grid(grid.images, grid.rows, grid.columns, name, seed, settings, drawing.out)
    for row in figures.get("rms", []) if not drawing.as_json else ():
        print(
            f"t = {row['t']:<6} samples {row['between_samples']:6.1f} apart, "
            f"{row['to_picture']:6.1f} from the picture (RMS, 0 to 255)"
        )
    tell_pictures(*written, seed, settings, drawing.as_json, figures)
