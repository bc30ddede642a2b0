"""The commands that run pipelines remotely or on a schedule: `submit`, `schedule` and `up`.

`submit` runs the stages on a Ray cluster, `schedule` creates a deployment on a Prefect server, and
`up` runs a server, a worker and a schedule on this machine until it is interrupted.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    say,
)
from flows.config.roots import open_for
from infra.console.log_redirect import terminated
from infra.errors import UnclipError
from infra.storage.store import Root

if TYPE_CHECKING:  # it imports packages that other commands do not need
    from flows.scheduling.deployments import Plan

Cron = Annotated[
    str,
    typer.Option(
        "--cron", metavar="CRON", help='Schedule as in a crontab: "0 3 * * *" is 3 a.m. every day.'
    ),
]
Every = Annotated[
    int,
    typer.Option(
        "--every", metavar="SECONDS", min=0, help="Or the interval in seconds, from now on."
    ),
]
Timezone = Annotated[
    str,
    typer.Option(
        "--timezone", metavar="ZONE", help="The time zone of --cron, such as Europe/Berlin."
    ),
]
Stages = Annotated[
    list[str] | None,
    typer.Option(
        "--stage", metavar="STAGE", help="Only this stage and what it needs; may be repeated."
    ),
]
Jobs = Annotated[
    str | None,
    typer.Option(
        "--submit",
        metavar="URL",
        help="Run each stage on this Ray job server, as `unclip submit` does.",
    ),
]
NOTIFY = "UNCLIP_NOTIFY_URL"


Port = Annotated[
    int,
    typer.Option(
        "--port", min=1024, max=65535, help="Port of Prefect's server and page, on loopback."
    ),
]


@dataclass(frozen=True)
class TimingOptions:
    """When a deployment runs: either `cron` in `timezone`, or every `every_s` seconds."""

    cron: Cron = ""
    every_s: Every = 0
    timezone: Timezone = "UTC"


@dataclass(frozen=True)
class ScheduledRunOptions(RunOptions):
    """Options of a scheduled run."""

    stages: Stages = None
    jobs: Jobs = None

    def request(self, recipe: str) -> RunRequest:
        """Return the request for a recipe's run."""
        return RunRequest(recipe, self.root, self.name, self.overrides, self.stages or [])


def submit(
    recipe: Recipe,
    address: Annotated[
        str,
        typer.Option(
            "--address", metavar="URL", help="Ray's job server, such as http://head:8265."
        ),
    ],
    root: RootUri = DEFAULT_ROOT,
    name: Name = None,
    overrides: Overrides = None,
    stages: Stages = None,
    as_json: Json = False,
) -> None:
    """Run the pipeline on a Ray cluster, each stage as a job.

    Run the same command again to rejoin jobs after a lost connection. Ctrl-C stops the jobs.
    """
    from flows.cli.run import make
    from infra.compute.ray_jobs import JobServer

    JobServer(address)  # reports an invalid address at once
    request = RunRequest(recipe, root, name, overrides, stages or [])
    make(request, None, as_json, jobs=address)


@option_groups
def schedule(
    recipe: Recipe,
    timing: TimingOptions = TimingOptions(),
    options: ScheduledRunOptions = ScheduledRunOptions(),
    paused: Annotated[
        bool, typer.Option("--paused", help="Create it paused; nothing runs until it is resumed.")
    ] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove the deployment instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Create or replace a Prefect deployment that runs the recipe on a schedule.

    Failures are posted to the webhook $UNCLIP_NOTIFY_URL, if set.
    """
    from flows.scheduling import deployments

    request = options.request(recipe)
    if remove:
        result = deployments.remove(request.run_name)
    else:
        plan, _ = _plan(request, options, timing, paused)
        result = deployments.deploy(plan, os.environ.get(NOTIFY, ""))
    if as_json:
        print_json(result)
    else:
        _print(result)


@option_groups
def up(
    recipe: Recipe,
    timing: TimingOptions = TimingOptions(),
    options: ScheduledRunOptions = ScheduledRunOptions(),
    port: Port = 4200,
    as_json: Json = False,
) -> None:
    """Start a Prefect server and a worker here, schedule the recipe, and run until interrupted."""
    from infra.console.log_redirect import quiet_terminal

    plan, opened = _plan(options.request(recipe), options, timing)
    home = (opened.folder or opened.scratch) / "prefect"
    with quiet_terminal(home / f"up-{time.strftime('%Y%m%d-%H%M%S')}.log") as log:
        from flows.scheduling.prefect_server import TOKEN_FILE, lasting_server

        with lasting_server(home, port) as url, terminated():
            from flows.scheduling import deployments

            result = deployments.deploy(plan, os.environ.get(NOTIFY, "")) | {
                "server": url,
                "log": str(log),
                "password": str(home / TOKEN_FILE),
            }
            with _worker(home) as worker:
                say(
                    f"up: {url.removesuffix('/api')} runs {result['deployment']} "
                    f"{result['schedule']}, log {log}, "
                    f"password for the page in {result['password']}"
                )
                _wait(worker, log)
    if as_json:
        print_json(result)


def _wait(worker: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until the worker ends or Ctrl-C. Raises UnclipError if the worker fails."""
    try:
        code = worker.wait()
    except KeyboardInterrupt:
        code = 0
    if code:
        raise UnclipError(f"Prefect's worker ended with exit code {code}: see {log}")


def _plan(
    request: RunRequest,
    options: ScheduledRunOptions,
    timing: TimingOptions,
    is_paused: bool = False,
) -> "tuple[Plan, Root]":
    """Check the request and return its deployment plan and its ROOT."""
    from flows.config.recipe_file import BUILT_IN, find_recipe
    from flows.orchestration.stages import STAGES
    from flows.runs.planning import stages_of
    from flows.scheduling.deployments import Plan, check_timing

    # Loading reports a mistake in the recipe now rather than at the first scheduled run.
    config, overrides = load_config(request.recipe, request.overrides, options.address)
    opened = open_for(request.root, for_writing=True)
    stages_of(config, request.targets, STAGES)
    path = find_recipe(request.recipe)
    parameters = {
        "recipe": path.stem if path.parent == BUILT_IN else str(path.resolve()),
        "root": opened.uri,
        "name": request.run_name,
        "overrides": overrides,
        "targets": request.targets,
        "scratch": None if opened.folder else str(opened.scratch),
        "jobs": options.jobs,
    }
    check_timing(timing.cron, timing.every_s)
    plan = Plan(
        request.run_name,
        parameters,
        Path.cwd(),
        timing.cron,
        timing.timezone,
        timing.every_s,
        is_paused,
    )
    return plan, opened


@contextmanager
def _worker(home: Path) -> Iterator["subprocess.Popen[bytes]"]:
    from flows.scheduling.deployments import POOL, WORKER_SETTINGS
    from flows.scheduling.prefect_server import die_with_parent

    command = [
        sys.executable,
        "-m",
        "prefect",
        "worker",
        "start",
        "--pool",
        POOL,
        "--type",
        "process",
        "--name",
        f"up-{os.getpid()}",
    ]
    worker = subprocess.Popen(
        command,
        env=os.environ
        | WORKER_SETTINGS
        | {"PREFECT_WORKER_QUERY_SECONDS": "2", "PREFECT_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=1,  # the log while `quiet_terminal` is open
        stderr=2,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    try:
        yield worker
    finally:
        worker.send_signal(signal.SIGINT)  # the worker first ends its runs
        try:
            worker.wait(timeout=30)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _print(result: dict[str, Any]) -> None:
    if result.get("removed"):
        print(f"{result['deployment']} is removed")
        return
    print(f"{result['deployment']}  {result['schedule']}{'  paused' if result['paused'] else ''}")
    print(f"one run at a time in the queue {result['queue']}; a worker runs it: {result['worker']}")
