"""What scripts/bench measures with: the built programs, brokers that run side by side, clients that ask them in turns."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import nodes
import rivals
from processes import CLIENT_ID, Failed, await_pong, running, tail

_SOURCES = Path(__file__).resolve().parent
# not by its own first line: an environment that was copied has that of another checkout
_BROKER = (rivals.PYTHON, str(Path(rivals.PYTHON).with_name("fdbroker")))
_PROGRAMS = ("floor", "chain", "client", "fanout")
CLIENT_S = 600.0


class Sizes(NamedTuple):
    """How much is measured."""

    rounds: int
    rounds_compared: int  # with others, stage by stage, with many rules
    rounds_listed: int
    requests: int  # in a round
    connects: int
    idle: int  # connections
    starts: int
    starts_with_rules: int
    namespaces: int
    messages: int
    fan_outs: int
    rules: tuple[int, ...]
    nodes: tuple[int, ...]  # in a List


class Bench:
    """The built programs in a folder of their own, and the CPUs: brokers on the first, the client on either."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder = folder
        self.sizes = sizes
        self.cpus = sorted(os.sched_getaffinity(0))
        self.policies = self.write_policies({"policy": nodes.policy([nodes.NULL])})
        compiler = os.environ.get("CC", "cc")
        for name in _PROGRAMS:
            source = str(_SOURCES / f"{name}.c")
            command = [compiler, "-O2", "-Wall", "-Wextra", f"-DNODES={nodes.NODES}", "-o", self.program(name), source]
            subprocess.run(command, check=True)

    def write_policies(self, texts: Mapping[str, str]) -> dict[str, Path]:
        """Write these texts; their files by name."""
        written = {}
        for name, text in texts.items():
            written[name] = self.folder / f"{name}.yaml"
            written[name].write_text(text)
        return written

    def program(self, name: str) -> str:
        """The path of a built program."""
        return str(self.folder / name)

    @contextlib.contextmanager
    def log(self, name: str) -> Iterator[IO[bytes]]:
        """The log of what has that name, to be appended to."""
        with (self.folder / f"{name}.log").open("ab") as log:
            yield log

    # ---- what is measured

    @contextlib.contextmanager
    def in_c(self, name: str) -> Iterator[tuple[Path, int]]:
        """The floor or the chain, running: its socket, and its process group."""
        address = self.folder / f"{name}.sock"
        with self.log(name) as log, running([self.program(name), str(address)], self.cpus[:1], log) as process:
            await_pong(process, address, Path(log.name))
            yield address, process.pid

    @contextlib.contextmanager
    def fdbroker(
        self, name: str, *, pinned: bool = True, policy: Path | None = None, command: Sequence[str] = _BROKER
    ) -> Iterator[tuple[Path, int]]:
        """The broker, running: its socket, and its process group. Without a journal the audit goes to a file."""
        address = self.folder / f"{name}.sock"
        policy = policy or self.policies["policy"]
        options = ["--policy", str(policy), "--socket", str(address), "--mode", "0666", "--group", "0"]
        cpus = self.cpus[:1] if pinned else self.cpus
        with self.log(name) as log, running([*command, "serve", *options], cpus, log) as process:
            await_pong(process, address, Path(log.name))
            yield address, process.pid

    @contextlib.contextmanager
    def staged(self, name: str, reports: Path | None = None) -> Iterator[tuple[Path, int]]:
        """The broker without its confinement, and with its stages timed if there is a folder for `reports`."""
        script = [rivals.PYTHON, "-I", str(_SOURCES / "staged.py"), *([str(reports)] if reports else [])]
        with self.fdbroker(name, command=script) as found:
            yield found

    @contextlib.contextmanager
    def idle_connections(self, count: int, address: Path) -> Iterator[None]:
        """So many connections of one process that does nothing with them."""
        command = [self.program("client"), "hold", str(count), str(address)]
        with self.log("hold") as log, running(command, self.cpus, log, client=True) as process:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise Failed(f"{count} idle connections could not be made: {tail(Path(log.name))}")
            yield

    # ---- clients

    def ask(
        self, cpu: int, requests: int, *targets: tuple[str, Path], rounds: int | None = None
    ) -> list[tuple[int, ...]]:
        """Let the client ask each (what, socket) in turn: of each round the medians in nanoseconds."""
        rounds = self.sizes.rounds if rounds is None else rounds
        command = [self.program("client"), "rounds", str(cpu), str(rounds), str(requests), *_words(targets)]
        return self._rounds(command, rounds, len(targets), client=True)

    def ask_python(self, cpu: int, *targets: tuple[str, Path]) -> list[tuple[int, ...]]:
        """The same, asked by the client in Python."""
        rounds = self.sizes.rounds_compared
        script = [rivals.PYTHON, "-I", str(_SOURCES / "asker.py")]
        command = [*script, *map(str, (cpu, rounds, self.sizes.requests // 2, CLIENT_ID)), *_words(targets)]
        return self._rounds(command, rounds, len(targets), output=True)

    def _rounds(self, command: Sequence[str], rounds: int, targets: int, **how: bool) -> list[tuple[int, ...]]:
        for old in self.folder.glob("*.log"):
            os.truncate(old, 0)  # the audit's records: only the disk would notice them
        found = [tuple(map(int, line.split())) for line in self.output(command, "client", self.cpus, **how)]
        if len(found) != rounds or any(len(one) != targets for one in found):
            raise Failed("the client did not tell of all its rounds")
        return found

    def output(self, command: Sequence[str], name: str, cpus: Sequence[int], **how: bool) -> list[bytes]:
        """The lines that a client prints. Raises Failed."""
        with self.log(name) as log, running(command, cpus, log, **how) as process:
            output, _ = process.communicate(timeout=CLIENT_S)
            if process.returncode != 0:
                raise Failed(f"{Path(command[0]).name} failed: {tail(Path(log.name))}")
        return output.splitlines()

    def starts(self, policy: Path, count: int) -> list[float]:
        """Seconds from starting `fdbroker serve` to its first answer, on all CPUs, each time."""
        seconds = []
        for number in range(count):
            began_s = time.monotonic()
            with self.fdbroker(f"start-{policy.stem}-{number}", pinned=False, policy=policy):
                seconds.append(time.monotonic() - began_s)
        return seconds


def _words(targets: Sequence[tuple[str, Path]]) -> list[str]:
    return [f"{what}@{address}" for what, address in targets]
