"""Starts the broker as it ships, with an attacker's program behind the confinement of each process.

Runs in: the broker's processes, instead of `-m fdbroker` and what fdbroker/launcher/start.py has them import. The launcher is the real one
and gives its real orders, descriptors and filters. Beside each process one is left that is still root and has done
nothing yet (the range): for each attempt it starts one that goes through the very start code of the real process, and then
runs the attempt in the place of what would serve. So the real processes live on, for the attempts to be aimed at.

Standard library and fdbroker only.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

TESTS = str(Path(__file__).parent)
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)
import attempts  # noqa: E402

# What is tried with: all that confines; not the filter; neither the filter nor Landlock; nothing at all.
MODES = ("whole", "no filter", "no landlock", "free")
# A filter that forbids nothing, for no process goes on without one. Source: linux/filter.h, linux/seccomp.h.
_ALLOWS_ALL = struct.pack("HBBI", 0x06, 0, 0, 0x7FFF_0000)
# The errno of the filter in the place of EPERM: so it can be told from what refuses behind it.
MARK = errno.EXFULL
ROLES = {
    **{name: (name,) for name in ("opener", "keeper", "inbox", "witness", "refuser")},
    "namespaces": ("holder", "worker", "child"),
}
_ENOUGH_S = 20.0
# the class of each process that has `serve`; the witness has a function
_SERVES = {"opener": "Opener", "keeper": "Keeper", "inbox": "Inbox", "namespaces": "Worker"}


def program(folder: str, store: bool, limits: dict[str, int] | None = None) -> tuple[str, ...]:
    """What to give Python in the place of `-m fdbroker`; with other `limits` in the launcher."""
    return ("-c", f"import sys; {code(folder, store, limits)}")


def code(folder: str, store: bool, limits: dict[str, int] | None = None) -> str:
    """The same as the end of a program that has imported sys."""
    return f"sys.path.insert(0, {TESTS!r}); import takeover; takeover.launcher({folder!r}, {store}, {limits or {}})"


def launcher(folder: str, store: bool, others: dict[str, int] | None = None) -> NoReturn:
    """The real `fdbroker serve`, whose children are started by `child`; with other limits."""
    from fdbroker.cli import main
    from fdbroker.launcher import own, start
    from fdbroker.limits import launcher as limits

    vars(limits).update(others or {})
    sys.path.remove(TESTS)  # what can be imported, the launcher's Landlock rules let it read

    def popen(command: list[str], **more: Any) -> subprocess.Popen[bytes]:
        *python, real, orders = command
        path, module = re.fullmatch(
            r"(.*; )from (fdbroker\.\w+)\.__main__ import main; sys\.exit\(main\(\)\)", real
        ).groups()
        code = f"sys.path.insert(0, {TESTS!r}); import takeover; takeover.child({module!r}, {folder!r}, {store})"
        return subprocess.Popen([*python, path + code, orders], **more)

    same = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    start.subprocess = types.SimpleNamespace(Popen=popen, **same)  # type: ignore[assignment]
    confine = own.confine_launcher

    def take(policy: str, bound_path: str) -> bool:
        def start_as(mode: str, attack: Callable[[], NoReturn]) -> None:
            _weaken(own, mode)
            confine(policy, bound_path)
            attack()

        if not os.path.exists(f"{folder}/forge"):
            _leave_range(folder, {"launcher": start_as})
        return confine(policy, bound_path)

    own.confine_launcher = take
    sys.exit(main())


def child(module: str, folder: str, store: bool) -> NoReturn:
    """The real child, and a range beside it."""
    name = module.removeprefix("fdbroker.")
    start = importlib.import_module(f"{module}.__main__")
    sys.path.remove(TESTS)
    roles = {role: _start_of(start, role) for role in ROLES[name]}
    if store and name == "inbox":
        roles = {"inbox-store": roles["inbox"]}
    orders = Path(folder, "forge")
    if orders.exists():
        told = json.loads(orders.read_text())
        if told["process"] == name:
            _be_forger(start, told)
    else:
        _leave_range(folder, roles)
    sys.exit(start.main())


def _start_of(start: types.ModuleType, role: str) -> Callable[[str, Callable[[], NoReturn]], None]:
    """How to become that process: its own main(), as far as where it would begin to serve."""
    from fdbroker.kernel import orders

    def become(mode: str, attack: Callable[[], NoReturn]) -> None:
        read, obey = orders.read, orders.obey

        def read_ours(argument: str) -> tuple[orders.Order, dict[str, int]]:
            order, descriptors = read(argument)
            os.lseek(descriptors["filter"], 0, os.SEEK_SET)  # the real one has read it
            return order._replace(parent=os.getppid()), descriptors

        def obey_and_attack(order: orders.Order, filter_fd: int) -> NoReturn:
            obey(order, filter_fd)
            attack()

        orders.read = read_ours
        _weaken(orders, mode)
        if role not in ("worker", "child"):
            orders.obey = obey_and_attack  # type: ignore[assignment]
        else:
            _be_worker(start, attack, forked=role == "child")
        start.main()

    return become


def _be_worker(start: types.ModuleType, attack: Callable[[], NoReturn], *, forked: bool) -> None:
    """Attack from the worker that the holder forks, or from the process that this forks for a question."""
    from fdbroker.namespaces import service
    from fdbroker.namespaces.queue import Request
    from fdbroker.terms import Namespace
    from fdbroker.wire import worker

    def end_as(process: int, *_: object) -> NoReturn:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        os._exit(code if code >= 0 else 128 - code)

    def asked(self: service.Worker) -> NoReturn:
        self._poll = select.epoll()
        self._start(Request(worker.Ask(1, 1, 1, (worker.Wanted(Namespace("net", "x")),)), None, 0.0))
        end_as(next(iter(self._children.values())).process)

    start._wait = end_as  # type: ignore[attr-defined]
    if forked:
        service.answer = lambda *_: attack()  # type: ignore[assignment]
        service.Worker.serve = asked  # type: ignore[method-assign]
    else:
        service.Worker.serve = lambda _: attack()  # type: ignore[method-assign,assignment]


def _weaken(where: Any, mode: str) -> None:
    """Leave a mechanism out, to see whether the others hold by themselves; with all, mark what the filter says."""
    real = where.confine

    def weaker(to: Any, program: bytes) -> bool:
        if mode == "whole":
            return bool(real(to, _marked(program)))
        return bool(real(to._replace(files=None if mode == "no landlock" else to.files), _ALLOWS_ALL))

    where.confine = weaker


def _marked(code: bytes) -> bytes:
    """The filter's own bytes; where it says EPERM, another number. Source: linux/filter.h, linux/seccomp.h."""
    eperm, mark = (struct.pack("HBBI", 0x06, 0, 0, 0x0005_0000 | number) for number in (errno.EPERM, MARK))
    lines = [code[place : place + 8] for place in range(0, len(code), 8)]
    if code and eperm not in lines:
        raise ValueError("the filter has no EPERM")
    return b"".join(mark if line == eperm else line for line in lines)


# ---- forging


def _let_in(forger: Any) -> bool:
    """Take one message of the opener's; the keeper lets whoever knocks in, and returns whether it has."""
    data, _ = forger._opener.receive_with_descriptors(3) or (b"", [])
    if not data or type(forger).__name__ != "Keeper":
        return False
    from fdbroker.wire import keeper  # which it has loaded: it could not any more

    said = keeper.OPENER_TO_KEEPER.decode(data)
    if isinstance(said, keeper.Knock):
        forger._opener.send(keeper.KEEPER_TO_OPENER.encode(keeper.LetIn(said.connection)))
    return type(said).__name__ != "Came"


def _be_forger(start: types.ModuleType, told: dict[str, Any]) -> None:
    """In the place of serving: wait for `after` messages, or for a client, then say `messages` to `to`.

    The witness waits for messages of the launcher, the keeper for connections, all others for messages of the opener.

    Each is bytes as hexadecimal digits, and how many descriptors go with it. Then read no more, but live
    until a link ends, or with `stay` for ever; the keeper lets in whoever knocks before that, and while it stays,
    unless it is `deaf`.
    """
    from fdbroker.kernel import sockets
    from fdbroker.wire import link

    waits_for = {"opener": "listener", "witness": "launcher"}.get(told["process"], "opener")

    def serve(self: Any) -> NoReturn:
        if told["process"] == "witness":
            self._launcher = self._opener = self  # it has one link, and has said there that it is ready
        elif hasattr(self, "_launcher"):
            self._launcher.send(link.READY)
        links = {"worker": self._asking._link if hasattr(self, "_asking") else None}
        links |= {one: getattr(self, f"_{one}", None) for one in ("opener", "inbox", "keeper", "launcher")}
        to = links[told["to"]]
        descriptors = json.loads(sys.argv[1])["descriptors"]
        poll = select.poll()
        poll.register(descriptors[waits_for], select.POLLIN)
        heard = 0
        while heard < told["after"]:
            poll.poll()
            heard += told["process"] == "opener" or not _let_in(self)
        with contextlib.suppress(BlockingIOError):  # the other one reads no more
            for data, count in told["messages"]:
                sockets.send(to._sock, bytes.fromhex(data), [2] * count)
        while told["stay"]:
            if told["process"] == "keeper" and not told["deaf"]:
                poll.poll()
                _let_in(self)
            else:
                time.sleep(1)
        ends = select.poll()
        for one in filter(None, links.values()):
            ends.register(one.fileno(), 0)
        ends.poll()  # until one of them hangs up
        os._exit(0)

    if told["process"] == "witness":
        start._next = serve
    else:
        getattr(start, _SERVES[told["process"]]).serve = serve


# ---- the range


def furnish(place: Path, uid: int, owned: contextlib.ExitStack) -> None:
    """A folder for the attempts of one process, which runs as `uid`."""
    place.mkdir()
    place.chmod(0o777)
    for name, mode in (("public", 0o666), ("secret", 0o600)):
        (place / name).write_text("text")
        (place / name).chmod(mode)
    shutil.copy("/usr/bin/id", place / "set-uid")
    os.chown(place / "set-uid", attempts.ANOTHER, attempts.ANOTHER)
    (place / "set-uid").chmod(0o4755)
    os.mknod(place / "mine-node", 0o020600, os.makedev(1, 5))
    os.chown(place / "mine-node", uid, uid)
    for name, kind in (("listening", socket.SOCK_STREAM), ("datagrams", socket.SOCK_DGRAM)):
        sock = owned.enter_context(socket.socket(socket.AF_UNIX, kind))
        sock.bind(str(place / name))
        (place / name).chmod(0o777)
        if kind == socket.SOCK_STREAM:
            sock.listen(4096)


def _leave_range(folder: str, roles: dict[str, Callable[..., None]]) -> None:
    """A process of its own, which is no child of the one that goes on."""
    middle = os.fork()
    if middle:
        os.waitpid(middle, 0)
        return
    if os.fork():
        os._exit(0)
    try:
        plan = Path(folder, "plan")
        end_s = time.monotonic() + 120
        while not plan.exists():
            if time.monotonic() > end_s or os.path.exists(f"{folder}/end"):
                os._exit(1)
            time.sleep(0.02)
        told = json.loads(plan.read_text())
        for role, become in roles.items():
            found = {name: _tries(told, role, name, become) for name in attempts.ATTEMPTS}
            place = Path(folder, f"{role}.json")
            place.with_suffix(".new").write_text(json.dumps(found))
            place.with_suffix(".new").rename(place)
    except BaseException as error:
        Path(folder, "failed").write_text(f"{list(roles)}: {error!r}")
    finally:
        os._exit(0)


def _tries(plan: dict[str, Any], role: str, name: str, become: Callable[..., None]) -> dict[str, str]:
    found: dict[str, str] = {}
    for mode in plan["modes"][role]:
        # what is possible stays so with less
        possible = mode == "no landlock" and found["no filter"] == "ok"
        found[mode] = "ok" if possible else _try(plan, role, name, mode, become)
    return found


def _try(plan: dict[str, Any], role: str, name: str, mode: str, become: Callable[..., None]) -> str:
    """One attempt in a process of its own: `ok`, the errno that refused it, or the signal that ended it."""
    _renew(plan, role)
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(writing, 1)
        os.close(reading)
        os.close(writing)
        _one(plan, role, name, mode, become)
    os.close(writing)
    text = b""
    end_s = time.monotonic() + _ENOUGH_S
    while select.select([reading], [], [], max(0, end_s - time.monotonic()))[0]:
        part = os.read(reading, 4096)
        if not part:
            break
        text += part
    else:
        os.kill(process, signal.SIGKILL)
        text = b"hangs"
    os.close(reading)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if text:
        said = text.decode().strip()
        return "ok" if said == str(attempts.ANOTHER) else "no effect" if said.isdecimal() else said
    number = -code if code < 0 else code - 128
    return signal.Signals(number).name if number > 0 else f"exit code {code}"


def _renew(plan: dict[str, Any], role: str) -> None:
    """What an attempt may have changed."""
    mine = Path(plan["folders"][role], "mine")
    made = [Path(plan["folders"][role], name) for name in ("new", "new-folder", "new-link", "node", "mine-2")]
    made += [Path(plan["state"], f"{role}-{name}") for name in ("new", "new-link")]
    for path in made:
        with contextlib.suppress(FileNotFoundError):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    mine.touch()
    uid = plan["uids"][role]
    if mine.stat().st_uid != uid:
        os.chown(mine, uid, uid)
    os.chmod(mine, 0o644)


def _one(plan: dict[str, Any], role: str, name: str, mode: str, become: Callable[..., None]) -> NoReturn:
    """The process that tries; what it mounts is its own."""
    said = "failed"
    try:
        with contextlib.suppress(OSError):  # a unit may refuse it
            attempts.sc("unshare", attempts.CLONE["mount"])
        world = attempts.World(plan, role)

        def attack() -> NoReturn:
            if mode != "free" and world.allowed:
                _raise_all(world.allowed)
            os.write(1, _outcome(attempts.ATTEMPTS[name], world).encode())
            os._exit(0)

        if mode == "free":
            attack()
        become(mode, attack)
    except BaseException as error:
        said = f"not confined: {error!r}"
    os.write(1, said.encode())
    os._exit(1)


def _outcome(attempt: attempts.Attempt, world: attempts.World) -> str:
    try:
        attempt.how(world)
    except OSError as error:
        if error.errno == MARK:
            return "filter"
        return errno.errorcode.get(error.errno or 0, str(error))
    except BaseException as error:
        return f"broken: {error!r}"
    return "ok"


def _raise_all(numbers: list[int]) -> None:
    """All that it has permitted, as an attacker would."""
    bits = sum(1 << number for number in numbers)
    data = struct.pack("6I", *(bits & 0xFFFFFFFF, bits & 0xFFFFFFFF, 0), *(bits >> 32, bits >> 32, 0))
    attempts.sc("capset", struct.pack("Ii", 0x20080522, 0), data)
