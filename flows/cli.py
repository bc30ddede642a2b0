"""The command line `unclip`: parses, prints, and sets the exit code (2 for a caller's mistake, 1 for a failure, 130 when interrupted).

Nothing heavy is imported before a command needs it, so that `--help` and a run whose stages are all current answer at once. Results
go to stdout (`--json`: one object), everything else to stderr.
"""

import os
import signal
import sys
from importlib import metadata
from typing import Annotated

import typer

from flows import comparing, enlarging, explaining, export, indexes, lecture, making, manipulating, pruning, scheduling, serving, using
from infra.compute.cluster import SPIN_COUNT
from infra.errors import UnclipError
from infra.storage.store import complaint

INTERRUPTED = 128 + signal.SIGINT

app = typer.Typer(
    name="unclip",
    help="From URL lists of image-text pairs to a text-to-image system, a search index and a report.",
    epilog="Any command takes --debug, which shows the traceback of an error.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
train = typer.Typer(help="Train one model, with what it needs.", no_args_is_help=True, rich_markup_mode=None)
diffusion = typer.Typer(
    help="The lecture's pictures: the Swiss roll, and what a decoder's x_t holds.", no_args_is_help=True, rich_markup_mode=None
)

report = typer.Typer(help="Reports of runs.", no_args_is_help=True, rich_markup_mode=None)

app.command()(making.run)
app.command()(making.status)
app.command()(making.runs)
app.command()(explaining.recipe)
app.command()(pruning.prune)
for _stage in ("ingest", "curate", "embed", "dedup", "evaluate"):
    app.command(_stage, help=f"Run the stage {_stage}, with what it needs.")(making.verb(_stage))
for _stage in ("clip", "prior", "decoder", "upsampler", "upsampler_2"):
    train.command(_stage, help=f"Train the {_stage}, with what it needs.")(making.verb(_stage))
app.add_typer(train, name="train")
app.add_typer(indexes.app, name="index")
app.command()(scheduling.submit)
app.command()(scheduling.schedule)
app.command()(scheduling.up)
app.command()(using.search)
app.command()(serving.serve)
app.command()(using.generate)
app.command()(manipulating.vary)
app.command()(manipulating.interpolate)
app.command()(manipulating.textdiff)
app.command()(manipulating.reconstruct)
app.command()(enlarging.upsample)
app.command()(export.export)
diffusion.command()(lecture.swiss_roll)
diffusion.command()(lecture.across_time)
diffusion.command()(lecture.shared_latents)
diffusion.command()(lecture.interpolate)
app.add_typer(diffusion, name="diffusion")
report.command()(comparing.compare)
app.add_typer(report, name="report")


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"unclip {metadata.version('unclip')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """From URL lists of image-text pairs to a text-to-image system, a search index and a report."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    given = sys.argv[1:] if arguments is None else arguments
    is_debug = "--debug" in given
    try:
        code = app([each for each in given if each != "--debug"], standalone_mode=False) or 0
    except typer.TyperException as error:
        code = _complain(error.format_message(), error.exit_code)
    except UnclipError as error:
        if is_debug:
            raise
        code = _complain(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of stdout (`| head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except Exception as error:
        if is_debug:
            raise
        code = _complain(complaint(error, "there") or f"{type(error).__name__}: {error} (--debug shows the traceback)", 1)
    if code == INTERRUPTED:  # typer returns it as well
        _complain("interrupted; the same command goes on from here", code)
    sys.exit(code)


def _complain(message: str, code: int) -> int:
    print(f"unclip: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()
