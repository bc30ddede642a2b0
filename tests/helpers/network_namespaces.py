"""Machines for a test: network namespaces with addresses of their own on one switch, whose cables
can be pulled and plugged in again.

The file system is shared, as a network's would be, except for disks of their own that machines may
get (a tmpfs in a mount namespace, which the others do not see). A namespace lives as long as its
holder, a process that ends with the test's, so nothing is left behind on the real machine and
nothing there is touched. Needs the right to make
namespaces; skips where it lacks.
"""

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

SUBNET = "10.77.0"
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Machine:
    """One namespace; number 0 is the switch, which has no address."""

    number: int
    holder: "subprocess.Popen[bytes]"
    disks: tuple[tuple[str, int], ...] = ()
    """Folders that are the machine's own, and how many bytes they may take."""

    @property
    def address(self) -> str:
        return f"{SUBNET}.{self.number}"

    @property
    def within(self) -> list[str]:
        """What stands before a command that is to run there."""
        spaces = [f"--net=/proc/{self.holder.pid}/ns/net"]
        if self.disks:
            spaces += [f"--mount=/proc/{self.holder.pid}/ns/mnt", "--wdns=/"]
        return ["nsenter", *spaces]

    def used_bytes(self, disk: str) -> int:
        """Return how much a disk of its own holds now."""
        stat = os.statvfs(f"/proc/{self.holder.pid}/root{disk}")
        return (stat.f_blocks - stat.f_bfree) * stat.f_frsize

    def do(self, *command: str) -> None:
        subprocess.run([*self.within, *command], check=True, capture_output=True)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have this thread's new sockets there while the block runs; a server that was bound in it
        answers there ever after.
        """
        with (
            Path("/proc/thread-self/ns/net").open() as home,
            Path(f"/proc/{self.holder.pid}/ns/net").open() as there,
        ):
            _move(there.fileno())
            try:
                yield
            finally:
                _move(home.fileno())

    def processes(self, words: str = "") -> list[int]:
        """Return the pids of what runs there, the holder apart, whose command line holds the
        words.
        """
        mine, found = Path(f"/proc/{self.holder.pid}/ns/net").readlink(), []
        for folder in Path("/proc").iterdir():
            try:
                if (
                    folder.name.isdigit()
                    and (folder / "ns" / "net").readlink() == mine
                    and int(folder.name) != self.holder.pid
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

    def lose_power(self) -> None:
        """Kill everything that runs there, without a word to anybody."""
        for _ in range(3):  # what is started meanwhile too
            for pid in self.processes():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


class Machines:
    """Context manager: that many machines, with the addresses 10.77.0.1, 10.77.0.2 and so on, which
    see each other and nothing else.
    """

    def __init__(
        self, count: int, isolated: int = 0, disks: tuple[tuple[str, int], ...] = ()
    ) -> None:
        """Machines with numbers up to `isolated` get these disks of their own."""
        self.count, self.isolated, self.disks = count, isolated, disks
        self.switch: Machine
        self.all: list[Machine] = []

    def __enter__(self) -> Self:
        try:
            self.switch = _start(0)
            self.switch.do("ip", "link", "add", "name", "bridge", "type", "bridge")
            self.switch.do("ip", "link", "set", "bridge", "up")
            for number in range(1, self.count + 1):
                machine = _start(number, self.disks if number <= self.isolated else ())
                self.all.append(machine)
                pid = str(machine.holder.pid)
                self.switch.do(
                    "ip",
                    "link",
                    "add",
                    f"port{number}",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth0",
                    "netns",
                    pid,
                )
                self.switch.do("ip", "link", "set", f"port{number}", "up")
                self.plug(machine)
                machine.do("ip", "address", "add", f"{machine.address}/24", "dev", "eth0")
                machine.do("ip", "link", "set", "eth0", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__(None, None, None)
            pytest.skip(f"no network namespaces here: {error}")
        return self

    def pull(self, machine: Machine) -> None:
        """Take a machine's cable off the switch: packets go nowhere, no connection learns of it."""
        self.switch.do("ip", "link", "set", f"port{machine.number}", "nomaster")

    def plug(self, machine: Machine) -> None:
        """Put it back."""
        self.switch.do("ip", "link", "set", f"port{machine.number}", "master", "bridge")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for machine in [*self.all, *([self.switch] if hasattr(self, "switch") else [])]:
            machine.lose_power()
            machine.holder.kill()
            machine.holder.wait()


def _move(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _start(number: int, disks: tuple[tuple[str, int], ...] = ()) -> Machine:
    if not shutil.which("unshare") or not shutil.which("ip"):
        raise OSError("unshare or ip is missing")
    # `cat` ends when this process, which holds its input, does
    mounts = [
        f"mkdir -p {disk} && mount -t tmpfs -o size={size} tmpfs {disk}" for disk, size in disks
    ]
    keep = " && ".join([*mounts, "ip link set lo up && echo up && exec cat"])
    for disk, _ in disks:
        Path(disk).mkdir(parents=True, exist_ok=True)
    holder = subprocess.Popen(
        ["unshare", "--net", *(["--mount"] if disks else []), "sh", "-c", keep],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert holder.stdout
    if holder.stdout.readline() != b"up\n":
        holder.wait()
        raise OSError("unshare --net is refused")
    return Machine(number, holder, disks)
