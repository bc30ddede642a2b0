"""`unclip export`: one self-contained folder with everything that drawing needs, and a card that says where it comes from.

Or, with `--format open_clip`, the run's CLIP alone, as `open_clip.create_model` loads it.

The folder holds `clip/`, `prior/`, `decoder/` (config and averaged weights; the tokenizer beside CLIP), `lineage.json` (the manifests of
all stages of the run), `README.md` (the model card) and, where the run was evaluated, its sheet of samples. `Unclip.load(folder)` reads it.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import DEFAULT_ROOT, Json, RootUri, RunName, print_json
from flows.config.roots import open_for
from flows.runs.export_bundle import write_export, write_staged


class Format(StrEnum):
    """What `--format` takes."""

    UNCLIP = "unclip"
    OPEN_CLIP = "open_clip"


def export(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="The folder to make; it must not exist yet, or be empty."
        ),
    ],
    root: RootUri = DEFAULT_ROOT,
    run: RunName = None,
    kind: Annotated[
        Format,
        typer.Option("--format", help="The whole system, or its CLIP for the package open_clip."),
    ] = Format.UNCLIP,
    as_json: Json = False,
) -> None:
    """Write a run's models, card and lineage into one folder that needs no Ray, no Prefect and no network to draw."""
    from flows.runs.records import committed_of, find_run

    opened = open_for(root, for_writing=False)
    record = find_run(opened, run)
    if kind is Format.OPEN_CLIP:
        from training.models import open_clip_format

        clip = committed_of(opened, record, "clip").local()
        written = write_staged(folder, lambda staging: open_clip_format.write(clip, staging))
    else:
        written = write_export(opened, record, folder)
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "run": record["name"],
                "files": written,
                "bytes": sum(entry["bytes"] for entry in written),
            }
        )
        return
    size = f"{sum(entry['bytes'] for entry in written) / 1e6:.1f} MB"
    hint = (
        f'open_clip.create_model("local-dir:{folder}") loads it'
        if kind is Format.OPEN_CLIP
        else "its README.md says what it is"
    )
    print(f"{folder}  ({size}; {hint})")
