"""The commands that run the pipeline, `run` and one per stage, and those that list its results.

The latter are `status` and `runs`. If all stages are current, a run reads only the manifests;
otherwise it starts Prefect and Ray.
"""

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.option_groups import option_groups
from flows.cli.options import (
    DEFAULT_ROOT,
    Json,
    Name,
    Overrides,
    Recipe,
    RootUri,
    RunOptions,
    RunRequest,
    load_config,
    print_json,
    run_name,
    say,
)
from flows.config.roots import open_for
from infra.errors import CallerError, UnclipError
from infra.storage.store import Root

if TYPE_CHECKING:
    from flows.runs.records import RunSummary

DRY_RUN_HELP = "Show what would run, with the models' parameters, memory and FLOPs; run nothing."


@option_groups
def run(
    recipe: Recipe,
    options: RunOptions = RunOptions(),
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
    throughput: Annotated[
        float | None,
        typer.Option(
            "--throughput",
            min=1e-6,
            metavar="TFLOPS",
            help="With --dry-run: estimate the time, for workers with this TFLOP/s in training.",
        ),
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option(
            "--pairs",
            min=1,
            max=10**12,
            help="With --dry-run: estimate the storage for this many pairs.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline; current stages are skipped."""
    for option, value in (("--throughput", throughput), ("--pairs", pairs)):
        if value and not dry_run:
            raise CallerError(f"{option} is for planning: give --dry-run as well")
    request = RunRequest(recipe, options.root, options.name, options.overrides, [])
    if dry_run:
        print_plan(request, as_json, throughput, pairs)
    else:
        make(request, options.address, as_json)


def verb(stage: str) -> Callable[..., None]:
    """Return the command that runs one stage and the stages that it needs."""

    @option_groups
    def command(
        recipe: Recipe,
        options: RunOptions = RunOptions(),
        dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
        as_json: Json = False,
    ) -> None:
        request = RunRequest(recipe, options.root, options.name, options.overrides, [stage])
        if dry_run:
            print_plan(request, as_json)
        else:
            make(request, options.address, as_json)

    return command


def status(
    recipe: Recipe,
    root: RootUri = DEFAULT_ROOT,
    name: Name = None,
    overrides: Overrides = None,
    checksums: Annotated[
        bool,
        typer.Option("--checksums", help="Also compare the checksum of every committed file."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show for every stage whether it is current, stale (and why) or missing."""
    from flows.live_index.lineage import additions, unsearched
    from flows.orchestration.stages import STAGES
    from flows.runs.planning import plan, stages_of
    from flows.runs.records import plan_summary
    from infra.errors import StorageError
    from infra.storage import manifests

    config, _ = load_config(recipe, overrides)
    opened = open_for(root, for_writing=False)
    plans = plan(opened, config, stages_of(config, (), STAGES))
    result = plan_summary(opened, run_name(recipe, name), plans)
    _print_result(result, as_json)
    clip = next(
        (stage_plan.committed for stage_plan in plans if stage_plan.stage.name == "clip"), None
    )
    for line in unsearched(additions(opened), clip) if clip else ():
        say(f"unclip: {line}")
    if checksums:
        for one_plan in plans:
            broken = manifests.verify(one_plan.committed) if one_plan.committed else []
            if broken:
                raise StorageError(
                    f"{one_plan.committed.uri if one_plan.committed else ''}: {broken[0]}; "
                    "remove that folder and run again"
                )


def runs(root: RootUri = DEFAULT_ROOT, as_json: Json = False) -> None:
    """List the runs of a ROOT, the last finished first, and mark the one used by default."""
    from flows.runs.records import list_runs, no_run

    opened = open_for(root, for_writing=False)
    listed = list_runs(opened)
    if as_json:
        print_json({"root": opened.uri, "runs": listed})
        return
    if not listed:
        say(f"unclip: {no_run(opened)}")
    for record in listed:
        mark = "followed" if record["followed"] else "not promoted" if record.get("gated") else ""
        when = record["finished"][:16].replace("T", " ")
        reached = record["report"] or f"{len(record['stages'])} stages, no report"
        print(f"{record['name']:<16}{when} UTC  {mark:<14}{reached}")


def print_plan(
    request: RunRequest, as_json: bool, throughput: float | None = None, pairs: int | None = None
) -> None:
    """Print the state of the requested stages and their capacity plan; run nothing."""
    from flows.orchestration.capacity_plan import capacity, published
    from flows.orchestration.stages import STAGES
    from flows.runs.planning import plan, stages_of
    from flows.runs.records import plan_summary

    config, _ = load_config(request.recipe, request.overrides)
    opened = open_for(request.root, for_writing=False)
    plans = plan(opened, config, stages_of(config, request.targets, STAGES))
    result = plan_summary(opened, request.run_name, plans)
    needs, theirs = capacity(config, throughput, pairs), published(request.recipe)
    for row, stage_plan in zip(result["stages"], plans, strict=True):
        parameters = stage_plan.stage.parameters(config) if stage_plan.stage.parameters else None
        if parameters is not None:
            row["parameters"] = parameters
        if stage_plan.stage.name in theirs:
            row["paper_parameters"] = theirs[stage_plan.stage.name]
        if stage_plan.stage.name in needs:
            row["need"] = needs[stage_plan.stage.name]
    _print_result(result, as_json)


def make(request: RunRequest, address: str | None, as_json: bool, jobs: str | None = None) -> None:
    """Run the requested stages and print the result.

    `address` is the Ray cluster to join, by default a small local one. If `jobs` is the address of
    a Ray job server, the stages run there as jobs.
    """
    from flows.recipe_run import begin, current_results, finish

    name = request.run_name
    config, overrides = load_config(request.recipe, request.overrides, address)
    opened = open_for(request.root, for_writing=True)
    this_run = begin(opened, name, request.recipe, config, request.targets, say)
    results = current_results(this_run)
    if results is not None:  # nothing to run: neither Prefect nor Ray is started
        result = finish(this_run, results, say)
    else:
        result = _run_flow(opened, request, overrides, jobs)
    _print_result(result, as_json)


def _run_flow(
    opened: Root, request: RunRequest, overrides: list[str], jobs: str | None
) -> "RunSummary":
    """Run the flow with the output of Prefect and Ray in a log file, and return its result."""
    from flows.scheduling.prefect_server import prefect_server
    from infra.console.log_redirect import noting_interrupts, quiet_terminal

    name, logs = request.run_name, (opened.folder or opened.scratch) / "logs"
    with (
        noting_interrupts(),
        quiet_terminal(logs / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.log") as log,
    ):
        say(f"run {name} in {opened.uri}, log {log}")
        try:
            with prefect_server(opened.scratch / "prefect"):
                from flows.pipeline import run_pipeline

                scratch = None if opened.folder else str(opened.scratch)
                try:
                    return run_pipeline(
                        request.recipe,
                        request.root,
                        name,
                        overrides,
                        request.targets,
                        scratch,
                        jobs,
                    )
                finally:
                    _drain_prefect()
        except UnclipError as error:
            raise type(error)(f"{_stage_of(error)}{error}") from error
        except Exception as error:
            logging.getLogger("unclip").exception("the run failed")
            cause = _behind(error)
            if cause:  # after a full disk, for example, Prefect's own writes fail as well
                raise type(cause)(f"{_stage_of(cause)}{cause}") from error
            last_line = (str(error).strip().splitlines() or [""])[-1]
            raise UnclipError(
                f"{_stage_of(error)}{type(error).__name__}: {last_line}; details are in {log}"
            ) from error


def _drain_prefect() -> None:
    """Send Prefect's queued logs and events while its server runs.

    Otherwise it would print errors on the terminal after the server has stopped.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=10)
    EventsWorker.drain_all(timeout=10)


def _behind(error: BaseException) -> UnclipError | None:
    """Return the UnclipError during whose handling this error was raised, or None."""
    context: BaseException | None = error
    while context is not None and not isinstance(context, UnclipError):
        context = context.__cause__ or context.__context__
    return context


def _stage_of(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    return f"{notes[0]}: " if notes else ""


def _print_result(result: "RunSummary", as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        _print_stages(result)


def _print_stages(result: "RunSummary") -> None:
    print(f"run {result['run']} in {result['root']}")
    for row in result["stages"]:
        size = f"{row['parameters'] / 1e6:.2f} M parameters" if "parameters" in row else ""
        size += (
            f" (the paper's: {row['paper_parameters'] / 1e6:,.0f} M)"
            if "paper_parameters" in row
            else ""
        )
        took = f"{row['seconds']:8.1f} s" if row.get("seconds") else ""
        notes = ", ".join(note for note in (size, row.get("why", ""), took) if note)
        print(f"{row['stage']:<12}{row['state']:<9}{row['key']}  {notes}".rstrip())
        if "need" in row:
            from flows.orchestration.capacity_plan import described

            print(f"            {described(row['need'])}")
    if result["report"]:
        print(f"report    {result['report']}")
