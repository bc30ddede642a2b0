"""Ray jobs that survive their driver: fixed submission ids, numbered attempts, streamed logs.

Ray runs a job once and forgets it with its cluster. The caller therefore records the attempt's
number (`claim`) before the job is submitted. A driver that comes back looks up the last claimed
attempt, joins it while it runs, and claims the next one otherwise. Two drivers that do so at once
submit the same id and the second joins; a late driver follows the attempt that others have claimed.
Knows nothing of stages.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.errors import CallerError, StorageAwayError, UnclipError

POLL_S = 1.0
ANSWER_LIMIT_S = 60
WAIT_NOTICE_S = 30
RETRY_AFTER_S, MAX_RETRY_S = 5.0, 300.0
"""Pause before the second attempt, which doubles with each further one, and its limit."""
RUNNING = ("PENDING", "RUNNING")
PASSING = ("No available agent", "status code 502", "status code 503", "status code 504")
RAY_LOG_MARKS = ("job_manager.py", "Running entrypoint for job")
PERMANENT_EXIT = 2
"""Exit code of an entrypoint that would fail again (`infra.errors.PERMANENT`)."""
AWAY_EXIT = 3
"""Exit code of an entrypoint whose store was unavailable; the caller decides how long to wait."""


@dataclass(frozen=True)
class Job:
    """What to run on the cluster; `name` with an attempt's number is the submission id."""

    name: str
    command: Callable[[int], str]
    """The shell command of an attempt."""
    attempts: int = 3
    cpus: float = 0
    gpus: float = 0
    memory_bytes: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that the entrypoint's node must have."""
    runtime_env: Mapping[str, Any] = field(default_factory=dict)


class JobServer:
    """Ray's job server at an address such as `http://head:8265`."""

    def __init__(self, address: str, silence_limit_s: float = 300) -> None:
        """Set the address, and for how many seconds to retry while the server does not answer."""
        if not address.startswith(("http://", "https://")):
            raise CallerError(
                f"--address {address}: must be the address of Ray's job server, such as "
                "http://head:8265"
            )
        if "@" in address:
            raise CallerError(
                "--address must not hold credentials, Prefect and logs show it: set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            )
        self.address, self.silence_limit_s = address, silence_limit_s
        self.client: Any = None

    def run(
        self,
        job: Job,
        claimed: int,
        claim: Callable[[int], int],
        is_done: Callable[[], bool],
        show: Callable[[str], None],
    ) -> None:
        """Run the job: join the attempt `claimed` (0 for none) if it runs, else submit attempts
        until one succeeds.

        `claim(n)` records attempt n where a returning driver finds it, unless a later attempt is
        recorded, and returns the recorded one. `is_done()` returns whether the result exists. The
        pause between attempts doubles each time. An interruption stops the job. Raises UnclipError
        if no attempt is left, if someone else stopped the job, or if the server does not answer,
        and StorageAwayError if an attempt ended because its store was unavailable.
        """
        number, tries = claimed, 0
        if not number or self.status(job, number) not in RUNNING:
            number, tries = self._submit(job, number + 1, claim), 1
        else:
            show(f"{job_id(job, number)} runs already: joined")
        while True:
            state, last_word = self._follow(job, number, show)
            if is_done():  # in this attempt or in another driver's
                return
            if state == "STOPPED":
                raise UnclipError(
                    f"{job_id(job, number)} was stopped by someone else; "
                    "run the same command again to continue"
                )
            why = last_word or f"it ended as {state or 'unknown to a new cluster'}"
            code = self._exit_code(job, number)
            if code == AWAY_EXIT:
                raise StorageAwayError(f"{job_id(job, number)}: {why}")
            if tries >= job.attempts or code == PERMANENT_EXIT:
                raise UnclipError(f"{job_id(job, number)}: {why}")
            pause_s = min(RETRY_AFTER_S * 2 ** max(0, tries - 1), MAX_RETRY_S)
            show(f"{job_id(job, number)}: {why}; attempt {number + 1} follows in {pause_s:.0f} s")
            time.sleep(pause_s)
            number, tries = self._submit(job, number + 1, claim), tries + 1

    def _submit(self, job: Job, number: int, claim: Callable[[int], int]) -> int:
        number = claim(number)

        def submit() -> None:
            try:
                self._client().submit_job(
                    submission_id=job_id(job, number),
                    entrypoint=job.command(number),
                    runtime_env=dict(job.runtime_env),
                    entrypoint_num_cpus=job.cpus or None,
                    entrypoint_num_gpus=job.gpus or None,
                    entrypoint_memory=job.memory_bytes or None,
                    entrypoint_label_selector=dict(job.labels) or None,
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise

        self._ask(submit)
        return number

    def _follow(self, job: Job, number: int, show: Callable[[str], None]) -> tuple[str, str]:
        """Show an attempt's log until it ends; return its state and the last line it said.

        The state is "" if the cluster does not know the attempt.
        """
        tail = _Tail(show)
        reader: threading.Thread | None = None
        waits_since_s: float | None = time.monotonic()
        try:
            while True:
                # A reader whose connection was cut starts again and shows only new lines.
                if reader is None or not reader.is_alive():
                    reader = threading.Thread(
                        target=tail.read, args=(self._client(), job_id(job, number)), daemon=True
                    )
                    reader.start()
                state = self.status(job, number)
                if state not in RUNNING:
                    reader.join(timeout=10)
                    if not tail.is_complete:
                        tail.finish(self._log(job, number))
                    return state, tail.last_word
                if state != "PENDING":
                    waits_since_s = None
                elif waits_since_s and time.monotonic() - waits_since_s > WAIT_NOTICE_S:
                    show(f"{job_id(job, number)} waits: {self._message(job, number)}")
                    waits_since_s = None
                time.sleep(POLL_S)
        except Exception:
            raise
        except BaseException:  # interrupted or cancelled: the result is no longer needed
            self._client().stop_job(job_id(job, number))
            show(f"{job_id(job, number)} is stopped")
            raise

    def status(self, job: Job, number: int) -> str:
        """Return the state of an attempt, or "" if the cluster does not know it.

        That is the case after the cluster was created again.
        """

        def ask() -> str:
            try:
                return str(self._client().get_job_status(job_id(job, number)).value)
            except RuntimeError as error:
                if "does not exist" in str(error):
                    return ""
                raise

        return self._ask(ask)

    def _log(self, job: Job, number: int) -> str:
        """Return an attempt's whole log, or "" if the cluster does not know the attempt."""
        try:
            return str(self._ask(lambda: self._client().get_job_logs(job_id(job, number))))
        except RuntimeError as error:
            if "does not exist" in str(error):
                return ""
            raise

    def _message(self, job: Job, number: int) -> str:
        """Return the server's message about a pending attempt and the resources that it needs."""
        message = self._ask(lambda: self._client().get_job_info(job_id(job, number)).message)
        required = {"CPU": job.cpus, "GPU": job.gpus, "memory": job.memory_bytes, **job.labels}
        return (
            f"{' '.join(str(message).split())} It asks one node for "
            f"{', '.join(f'{k} {v}' for k, v in required.items() if v) or 'nothing'}"
        )

    def _exit_code(self, job: Job, number: int) -> int | None:
        try:
            code: int | None = self._ask(
                lambda: self._client().get_job_info(job_id(job, number)).driver_exit_code
            )
            return code
        except RuntimeError:
            return None

    def _client(self) -> Any:
        if self.client is None:
            from ray.job_submission import JobSubmissionClient

            class Client(JobSubmissionClient):
                """Ray's client with a time limit for answers.

                Without one it waits for ever if the head loses power or network in mid-answer.
                """

                def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
                    return super()._do_request(method, endpoint, timeout=ANSWER_LIMIT_S, **options)

            self.client = Client(self.address)
        return self.client

    def _ask(self, request: Callable[[], Any]) -> Any:
        """Send a request to the server, again while it does not answer."""
        limit = time.monotonic() + self.silence_limit_s
        while True:
            try:
                return request()
            except (ConnectionError, OSError, TimeoutError) as error:
                if time.monotonic() >= limit:
                    line = " ".join(str(error).split())[:200]
                    raise UnclipError(
                        f"Ray's job server at {self.address} does not answer: {line}; the same "
                        "command joins the job again"
                    ) from error
                time.sleep(POLL_S)
            except Exception as error:
                if type(error).__name__ == "AuthenticationError" or "status code 401" in str(error):
                    raise UnclipError(
                        f"Ray at {self.address} refuses us: set RAY_AUTH_MODE=token and "
                        "RAY_AUTH_TOKEN as its head has them"
                    ) from error
                if not any(words in str(error) for words in PASSING) or time.monotonic() >= limit:
                    raise
                time.sleep(POLL_S)


class _Tail:
    """Shows a job's log line by line.

    After a lost connection the server sends the log from the beginning; only new lines are shown.
    `is_complete` tells whether the log was read to its end.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self.show, self.shown, self.last_word = show, 0, ""
        self.is_complete = False
        self.guard = threading.Lock()

    def read(self, client: Any, submission_id: str) -> None:
        asyncio.run(self._read(client, submission_id))

    async def _read(self, client: Any, submission_id: str) -> None:
        line_number, rest = 0, ""
        try:
            async for piece in client.tail_job_logs(submission_id):
                *lines, rest = (rest + piece).split("\n")
                for line in lines:
                    line_number += 1
                    self._take_new(line, line_number)
        except (RuntimeError, OSError):
            return  # the connection was cut; the caller starts a new reader while the job runs
        if rest:
            self._take_new(rest, line_number + 1)
        self.is_complete = True

    def finish(self, log: str) -> None:
        """Show the lines of the whole log that no reader has shown; later ones show nothing."""
        for line_number, line in enumerate(log.splitlines(), 1):
            self._take_new(line, line_number)
        self.is_complete = True

    def _take_new(self, line: str, line_number: int) -> None:
        with self.guard:
            if line_number > self.shown and not self.is_complete:
                self.shown = line_number
                self._take(line)

    def _take(self, line: str) -> None:
        if line.startswith("unclip: "):
            self.last_word = line.removeprefix("unclip: ")
        elif line.strip() and not any(words in line for words in RAY_LOG_MARKS):
            self.show(line)


def job_id(job: Job, number: int) -> str:
    """Return the submission id of an attempt."""
    return f"{job.name}-{number}"
