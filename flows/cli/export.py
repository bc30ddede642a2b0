"""The command `export`: write one self-contained folder with a run's models and a model card.

The folder holds `clip/`, `prior/`, `decoder/` (config and averaged weights; the tokenizer is in
`clip/`), `lineage.json` (the manifests of the run's stages), `README.md` (the model card) and, if
the run was evaluated, its sheet of samples. `Unclip.load(folder)` reads it. With `--format
open_clip` it holds only the run's CLIP, in the format of `open_clip.create_model`.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import DEFAULT_ROOT, Json, RootUri, RunName, print_json
from flows.config.roots import open_for
from flows.runs.export_bundle import write_export, write_staged
from infra.storage.stage_files import pinned_copy


class Format(StrEnum):
    """What `--format` takes."""

    UNCLIP = "unclip"
    OPEN_CLIP = "open_clip"


def export(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="The folder to write; it must be new or empty."),
    ],
    root: RootUri = DEFAULT_ROOT,
    run: RunName = None,
    kind: Annotated[
        Format,
        typer.Option("--format", help="The whole system, or only its CLIP for open_clip."),
    ] = Format.UNCLIP,
    as_json: Json = False,
) -> None:
    """Write a run's models, card and lineage to a folder that is usable without Ray or Prefect."""
    from flows.runs.records import committed_of, find_run

    opened = open_for(root, for_writing=False)
    record = find_run(opened, run)
    if kind is Format.OPEN_CLIP:
        from training.models import open_clip_format

        clip = pinned_copy(committed_of(opened, record, "clip").files)
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
