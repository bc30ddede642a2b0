"""A real Ray cluster for a test: a head with its job server and further nodes, each by its own `ray
start`, with token authentication.

Every process that it starts carries a mark in its environment, by which it is found and ended: `ray
stop` would end others' too.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.helpers.network_namespaces import Machine

START_LIMIT_S = 240
HERE = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RayCluster:
    """Context manager: one node or more; `address` is the job server's, `environment` what clients
    need.

    With `machines` each node runs on its own, the head on the first; else all on this one.
    `settings` are variables of every node.
    """

    def __init__(
        self,
        cpus: tuple[int, ...] = (2,),
        machines: Sequence[Machine] = (),
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.cpus, self.machines, self.settings = cpus, machines, dict(settings or {})
        self.mark = f"UNCLIP_TEST_CLUSTER={secrets.token_hex(8)}"
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's sockets lie below it
        self.port, self.dashboard = free_port(), free_port()
        self.head = machines[0].address if machines else "127.0.0.1"
        self.address = f"http://{self.head}:{self.dashboard}"
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.nodes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._start_head()
            for number, cpus in enumerate(self.cpus[1:], 1):
                self.add_node(cpus, self.machines[number] if self.machines else None)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _start(
        self, arguments: list[str], cpus: int, machine: Machine | None
    ) -> "subprocess.Popen[bytes]":
        mark, _, value = self.mark.partition("=")
        environment = {
            name: text for name, text in os.environ.items() if not name.startswith("RAY_")
        } | self.environment
        environment |= {
            mark: value,
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(HERE),
        } | self.settings
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        log = (self.folder / f"node-{len(self.nodes)}.log").open("wb")
        command = [*machine.within] if machine else []
        command += [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--block",
            "--disable-usage-stats",
        ]
        command += [f"--node-ip-address={machine.address if machine else '127.0.0.1'}"]
        # The agent that takes jobs has a fixed port by default, which another Ray on this machine
        # may hold.
        command += [
            f"--dashboard-agent-listen-port={free_port()}",
            f"--dashboard-agent-grpc-port={free_port()}",
        ]
        command += [
            f"--metrics-export-port={free_port()}",
            f"--runtime-env-agent-port={free_port()}",
        ]
        if (
            machine and self.nodes
        ):  # `ray start` gives up after 30 s, and a raylet that was cut off ends itself
            command = ["sh", "-c", 'until "$@"; do sleep 1; done', "node", *command]
        node = subprocess.Popen(
            [*command, f"--num-cpus={cpus}", f"--object-store-memory={100 << 20}", *arguments],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.nodes.append(node)
        return node

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Let this process speak to the cluster; Ray keeps the token that it read first, which
        another test may have been.
        """
        from ray._private.authentication_test_utils import reset_auth_token_state

        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            reset_auth_token_state()
            yield
        reset_auth_token_state()

    def add_node(self, cpus: int, machine: Machine | None = None) -> "subprocess.Popen[bytes]":
        """Start a further node and return its leader; on a machine of its own it is started again
        when it ends, as by a service manager.
        """
        return self._start([f"--address={self.head}:{self.port}"], cpus, machine)

    def _start_head(self) -> None:
        """Start the head, again where Ray gives up: its raylet does where an agent of its own takes
        15 s to begin, on a busy machine.
        """
        head = [
            "--head",
            f"--port={self.port}",
            f"--dashboard-host={self.head}",
            f"--dashboard-port={self.dashboard}",
        ]
        limit, log = time.monotonic() + START_LIMIT_S, self.folder / "node-0.log"
        while not self.nodes or "Ray runtime started" not in log.read_text() or not self._answers():
            if not self.nodes or self.nodes[0].poll() is not None:
                self.nodes.clear()
                self._start(
                    [*head, f"--temp-dir={self.folder}"],
                    self.cpus[0],
                    self.machines[0] if self.machines else None,
                )
            assert time.monotonic() < limit, (
                f"Ray's head did not come up: {log.read_text()[-2000:]}"
            )
            time.sleep(0.3)

    def _answers(self) -> bool:
        """Say whether the job server does, asked from where the head is."""
        code = "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], headers={'Authorization': sys.argv[2]}), timeout=5)"  # noqa: E501
        within = self.machines[0].within if self.machines else []
        asked = [
            *within,
            sys.executable,
            "-c",
            code,
            f"{self.address}/api/version",
            f"Bearer {self.environment['RAY_AUTH_TOKEN']}",
        ]
        return subprocess.run(asked, capture_output=True).returncode == 0

    def processes(self, words: str = "") -> list[int]:
        """Return this cluster's processes whose command line holds the words."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if (
                    folder.name.isdigit()
                    and self.mark.encode() in (folder / "environ").read_bytes()
                ):
                    command = (
                        (folder / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                    )
                    if words in command:
                        found.append(int(folder.name))
            except OSError:
                continue
        return found

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _ in range(3):
            for pid in self.processes():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.2)
        for node in self.nodes:
            node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
