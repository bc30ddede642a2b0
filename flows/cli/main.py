"""The command line `unclip`: registers the commands, reports errors and sets the exit code.

Exit codes are 2 for a caller's mistake, 1 for a failure and 130 for an interruption. Commands
import heavy packages only when they need them, so that `--help` and a run whose stages are all
current are fast. Results go to stdout (one JSON object with `--json`), everything else to stderr.
"""

import os
import signal
import sys
from importlib import metadata
from typing import Annotated

import typer

from flows.cli import (
    compare,
    export,
    generate,
    index,
    manipulate,
    prune,
    recipe,
    run,
    schedule,
    search,
    serve,
    upsample,
)
from flows.cli import diffusion as diffusion_commands
from infra.compute.cluster import SPIN_COUNT
from infra.errors import UnclipError
from infra.storage.store import complaint

INTERRUPTED = 128 + signal.SIGINT

HELP = "From URL lists of image-text pairs to a text-to-image system, a search index and a report."

app = typer.Typer(
    name="unclip",
    help=HELP,
    epilog="Any command takes --debug, which shows the traceback of an error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
train = typer.Typer(
    help="Train one model, with what it needs.", no_args_is_help=True, rich_markup_mode=None
)
diffusion = typer.Typer(
    help="The lecture's pictures: the Swiss roll, and what a decoder's x_t holds.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

report = typer.Typer(help="Reports of runs.", no_args_is_help=True, rich_markup_mode=None)

app.command()(run.run)
app.command()(run.status)
app.command()(run.runs)
app.command()(recipe.recipe)
app.command()(prune.prune)
for _stage in ("ingest", "curate", "embed", "dedup", "evaluate"):
    app.command(_stage, help=f"Run the stage {_stage}, with what it needs.")(run.verb(_stage))
for _stage in ("clip", "prior", "decoder", "upsampler", "upsampler_2"):
    train.command(_stage, help=f"Train the {_stage}, with what it needs.")(run.verb(_stage))
app.add_typer(train, name="train")
app.add_typer(index.app, name="index")
app.command()(schedule.submit)
app.command()(schedule.schedule)
app.command()(schedule.up)
app.command()(search.search)
app.command()(serve.serve)
app.command(hidden=True)(serve.serve_worker)
app.command()(generate.generate)
app.command()(manipulate.vary)
app.command()(manipulate.interpolate)
app.command()(manipulate.textdiff)
app.command()(manipulate.reconstruct)
app.command()(upsample.upsample)
app.command()(export.export)
diffusion.command()(diffusion_commands.swiss_roll)
diffusion.command()(diffusion_commands.across_time)
diffusion.command()(diffusion_commands.shared_latents)
diffusion.command()(diffusion_commands.interpolate)
app.add_typer(diffusion, name="diffusion")
report.command()(compare.compare)
app.add_typer(report, name="report")


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"unclip {metadata.version('unclip')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_tell_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """From URL lists of image-text pairs to a text-to-image system, a search index and a report."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit the process with its exit code."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    words = sys.argv[1:] if arguments is None else arguments
    is_debug = "--debug" in words
    try:
        code = app([word for word in words if word != "--debug"], standalone_mode=False) or 0
    except typer.TyperException as error:
        code = _complain(error.format_message(), error.exit_code)
    except UnclipError as error:
        if is_debug:
            raise
        code = _complain(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of stdout has ended, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except Exception as error:
        if is_debug:
            raise
        code = _complain(
            complaint(error, "there")
            or f"{type(error).__name__}: {error} (--debug shows the traceback)",
            1,
        )
    if code == INTERRUPTED:  # typer returns it as well
        _complain("interrupted; the same command resumes from here", code)
    sys.exit(code)


def _complain(message: str, code: int) -> int:
    print(f"unclip: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()
