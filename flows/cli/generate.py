"""The command `generate`, and the options and helpers of all commands that draw images.

Reads a run's models; writes images to the folder --out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.option_groups import option_groups
from flows.cli.options import DEFAULT_ROOT, Json, RootUri, RunName, print_json
from flows.config.roots import open_for
from infra.captions import clean_caption
from infra.errors import CallerError
from infra.storage.manifests import Committed
from infra.storage.stage_files import pinned_copy
from infra.storage.store import Root

if TYPE_CHECKING:
    from flows.runs.record_schema import RunRecord
    from training.generation.unclip import Unclip


Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**31, help="The same seed gives the same pictures.")
]

Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance", min=0, max=50, help="Strength of the guidance; by default the recipe's."
    ),
]

Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Where the grid and the pictures go.")
]


@dataclass(frozen=True)
class DrawingOptions:
    """Options of every command that draws with a run's models."""

    out: Out = Path("out")
    root: RootUri = DEFAULT_ROOT
    run: RunName = None
    as_json: Json = False


@dataclass(frozen=True)
class SamplingOptions:
    """Options of the decoder's sampling; None means the recipe's value."""

    seed: Seed = 0
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, max=1000, help="Denoising steps; by default the recipe's."),
    ] = None
    guidance: Guidance = None


def load_system(
    opened: Root, run: str | None, more: tuple[str, ...] = ()
) -> "tuple[Unclip, RunRecord, dict[str, Committed]]":
    """Return a run's models, its record, and the folders of clip, prior, decoder and `more`."""
    from flows.runs.records import committed_of, find_run

    record = find_run(opened, run)
    stages = {
        stage: committed_of(opened, record, stage) for stage in ("clip", "prior", "decoder", *more)
    }
    from training.generation.unclip import Unclip

    return (
        Unclip.load(
            pinned_copy(stages["clip"].files),
            pinned_copy(stages["prior"].files),
            pinned_copy(stages["decoder"].files),
        ),
        record,
        stages,
    )


def guidance_of(model: "Unclip", requested: float | None) -> float:
    """Return the requested guidance scale, or the recipe's; it is stored in the images."""
    return model.decoder.config.guidance if requested is None else requested


def spoken(command: str, text: str) -> str:
    """Return a command line text, cleaned as captions are. Raises CallerError for a text that is
    blank then.
    """
    cleaned = clean_caption(text)
    if not cleaned:
        raise CallerError(f"{command}: the text is empty")
    return cleaned


def check_files(files: Iterable[Path], option: str = "") -> None:
    """Raise CallerError for a missing file; `option` is the option that named it."""
    for file in files:
        if not file.is_file():
            raise CallerError(f"{option} {file}: there is no such file".lstrip())


def several(first: str, count: int) -> str:
    """Return the name of a grid of `count` images, from the name of the first."""
    return f"{first} and {count - 1} more" if count > 1 else first


def tell_pictures(
    files: Sequence[Path],
    grid: Path,
    seed: int,
    settings: Mapping[str, Any],
    as_json: bool,
    figures: Mapping[str, Any] | None = None,
    note: str = "",
) -> None:
    """Print the written files: a JSON object with `figures`, or a line that ends in `note`."""
    if as_json:
        measured = {} if figures is None else {"figures": figures}
        print_json(
            {
                "seed": seed,
                "settings": settings,
                **measured,
                "files": [str(file) for file in files],
                "grid": str(grid),
            }
        )
        return
    print(f"{grid}  ({len(files)} pictures beside it{note})")


def upsampler_stages(opened: Root, record: "RunRecord") -> dict[str, Committed]:
    """Return the folders of a run's up-samplers in order. Raises CallerError if it has none."""
    from flows.runs.records import committed_of
    from flows.runs.stage import UPSAMPLERS

    return {
        stage: committed_of(opened, record, stage)
        for stage in UPSAMPLERS
        if stage == UPSAMPLERS[0] or stage in record["stages"]
    }


@option_groups
def generate(
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT...", help="What to draw; each prompt is one row of the grid."
        ),
    ],
    count: Annotated[
        int, typer.Option("--count", min=1, max=256, help="Pictures of each prompt.")
    ] = 4,
    sampling: SamplingOptions = SamplingOptions(),
    upsample: Annotated[
        bool, typer.Option("--upsample", help="Enlarge the pictures with the run's up-samplers.")
    ] = False,
    drawing: DrawingOptions = DrawingOptions(),
) -> None:
    """Draw pictures from text: a grid, and every picture as a PNG with its prompt and settings."""
    prompts = [spoken("generate", prompt) for prompt in prompts]
    opened = open_for(drawing.root, for_writing=False)
    model, record, stages = load_system(opened, drawing.run)
    if upsample:
        behind = upsampler_stages(opened, record)
        stages |= behind
        model.upsamplers = tuple(pinned_copy(committed.files) for committed in behind.values())
    seed, steps = sampling.seed, sampling.steps or model.decoder.config.sampling_steps
    guidance = guidance_of(model, sampling.guidance)
    images = model.generate(prompts, count, seed, steps, guidance, upsample)
    settings = {
        "run": record["name"],
        "steps": steps,
        "guidance": guidance,
        "count": count,
        **{stage: committed.key for stage, committed in stages.items()},
    }
    from flows.images.png import write_pictures

    written = write_pictures(images, prompts, seed, settings, drawing.out)
    tell_pictures(*written, seed, settings, drawing.as_json)
