"""The launcher's life: load, start, then signals, reload and watchdog until it stops.

Runs in: launcher. It reads nothing from any client; its children's links carry a few fixed words.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import NamedTuple

from fdbroker import errors, limits
from fdbroker.errors import FdbrokerError, Finding, PolicyError
from fdbroker.kernel import capabilities, confine, landlock, memfd, processes
from fdbroker.launcher import filters, listen, start
from fdbroker.launcher.journal import Journal
from fdbroker.launcher.needs import Needs, check_reload, needs
from fdbroker.launcher.notify import Notify
from fdbroker.policy.compile import failed_tests, load_policy
from fdbroker.policy.compiled import Policy, to_bytes
from fdbroker.wire import link

# What each child may say to us.
_SAYS = {
    "opener": link.OPENER_TO_LAUNCHER,
    "inbox": link.INBOX_TO_LAUNCHER,
    "namespaces": link.WORKER_TO_LAUNCHER,
}
_STOP_LOOK_S = 0.05
# How often we look whether a child has ended that does not say so by its link, and whether the journal is another one.
_LOOK_S = 5.0
_SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)


class Options(NamedTuple):
    """What `fdbroker serve` was told."""

    policy: str
    address: str
    mode: int
    group: str | None
    state: str


class ServiceFailed(FdbrokerError):
    """A child died, or did not come up; the service ends, and its manager starts it again."""


class CapabilitiesMissing(FdbrokerError):
    """The policy needs what the service was not given when it was started: by its unit, or in a container."""

    exit_code = errors.EX_CONFIG


def say(text: str, priority: int = 6) -> None:
    """One message to standard error, which the service manager puts into the journal with that syslog(3) priority."""
    begin = f"<{priority}>" if "JOURNAL_STREAM" in os.environ else "fdbroker: "
    with contextlib.suppress(OSError):
        sys.stderr.write("".join(f"{begin}{line}\n" for line in text.splitlines()))
        sys.stderr.flush()


def checked_policy(path: str) -> tuple[Policy, Needs]:
    """Load, test, and see what it needs. Raises PolicyError when anything is wrong or a test of the policy fails."""
    loaded = load_policy(path, trusted=True)
    failed = failed_tests(loaded)
    if failed:
        raise PolicyError(failed)
    size = len(to_bytes(loaded.policy))
    if size > limits.POLICY_LINK_BYTES:
        expected = f"at most {limits.POLICY_LINK_BYTES} bytes"
        raise PolicyError([Finding(path, 0, 0, "is too large once it is compiled", expected, f"{size} bytes")])
    return loaded.policy, needs(loaded.policy)


class Launcher:
    """The service. `run` returns when it was told to stop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._notify = Notify()
        self._journal = Journal()
        self._generation = 1
        self._stop_at_s = 0.0
        self._children: list[start.Child] = []
        self._epoll = select.epoll()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> None:
        """Serve. Raises PolicyError and CannotListen before anything is started, ServiceFailed afterwards."""
        policy, self._given = checked_policy(self._options.policy)
        options = self._options
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if descriptors != resource.RLIM_INFINITY and descriptors <= limits.DESCRIPTORS_RESERVED:
            needed = limits.DESCRIPTORS_RESERVED
            raise ServiceFailed(f"at most {descriptors} descriptors (ulimit -Hn) leave none for clients: over {needed}")
        for warning in self._given.warnings:
            say(warning, priority=4)
        missing = sorted((self._given.capabilities | (self._given.worker or frozenset())) - capabilities.effective())
        if missing:
            hint = ": see /usr/share/doc/fdbroker/namespaces.conf" if self._given.worker is not None else ""
            raise CapabilitiesMissing(f"the policy needs {', '.join(missing)}, which this service may not have{hint}")
        if not self._journal.await_place():
            raise ServiceFailed("there is no journal, and standard error is /dev/null: nothing would be recorded")
        listener = listen.inherited() or listen.bound(options.address, options.mode, options.group)
        if not listener.asked_credentials:
            say("who connected already is disconnected: add PassCredentials=yes to the socket's unit", priority=4)
        try:
            self._catch_signals()
            self._children = start.start_children(
                listener.sock, to_bytes(policy), self._given, options.state, self._journal.sock
            )
            listener.sock.close()  # the opener alone accepts
            self._await_ready()
            self._confine(listener.path)
            self._notify.tell(READY=1, STATUS=f"Serving with {options.policy}")
            say(f"serving with {options.policy}")
            self._loop()
        finally:
            listener.sock.close()
            listener.remove()
            for child in self._children:
                child.link.close()
            self._notify.close()
            self._journal.close()

    # ---- start

    def _catch_signals(self) -> None:
        def note(_number: int, _frame: FrameType | None) -> None:
            """The number comes through the wake-up pipe."""

        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, note)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def _await_ready(self) -> None:
        """Wait for all children to be confined and to serve."""
        self._epoll.register(self._wake_read, select.EPOLLIN)
        for child in self._children:
            self._epoll.register(child.link.fileno(), select.EPOLLIN)
        deadline_s = time.monotonic() + limits.START_SECONDS
        missing = {child.name for child in self._children}
        while missing:
            if time.monotonic() > deadline_s:
                raise ServiceFailed(f"{' and '.join(sorted(missing))} did not come up in {limits.START_SECONDS} s")
            self._epoll.poll(0.5)
            for child in self._children:
                data = child.link.receive()
                if data == b"":
                    raise ServiceFailed(self._end_of(child))
                if data is not None:
                    link.decode(_SAYS[child.name], data)
                    missing.discard(child.name)

    def _confine(self, bound_path: str) -> None:
        """Give up what starting needed. Reload reads the policy and NSS again, and no more."""
        read = landlock.READ_FILE | landlock.READ_DIR
        places = ["/etc", "/usr", "/lib", "/lib64", "/run", "/var/lib", "/proc", sys.prefix, sys.base_prefix]
        files = [(place, read) for place in (*places, os.path.dirname(os.path.abspath(self._options.policy)))]
        files += [(place, read) for place in sys.path if place]
        if bound_path:
            files.append((os.path.dirname(bound_path), landlock.REMOVE_FILE))
        # needs() lists the folders of /dev and reads no node
        files.append(("/dev", landlock.READ_DIR))
        ids = os.getuid(), os.getgid(), tuple(os.getgroups())
        kept = confine.Confinement(*ids, frozenset(), tuple(files), filters.compile_launchers(), 0)
        if not confine.confine(kept):
            say("this kernel has no Landlock: only its capabilities limit what the opener can open", priority=4)

    # ---- run

    def _look(self) -> None:
        """A process can end without its links: when one of its threads waits in the kernel. Raises ServiceFailed."""
        for child in self._children:
            if child.process.poll() is None and processes.main_thread_ended(child.process.pid):
                raise ServiceFailed(f"the {child.name} has ended, but for a thread that waits in the kernel")

    def _loop(self) -> None:
        watchdog_s = self._notify.watchdog_s
        look_at_s = time.monotonic()
        ping_at_s = time.monotonic() if watchdog_s else 0.0
        while True:
            now_s = time.monotonic()
            if watchdog_s and now_s >= ping_at_s:
                ping_at_s = now_s + watchdog_s
                self._opener.link.send(link.PING)
            if now_s >= look_at_s:
                look_at_s = now_s + _LOOK_S
                self._look()
                self._journal.look()
            ends_s = [at_s for at_s in (look_at_s, ping_at_s, self._stop_at_s) if at_s]
            if self._stop_at_s:
                ends_s.append(now_s + _STOP_LOOK_S)  # a child's link has ended a moment before it
            self._epoll.poll(max(0.0, min(ends_s) - now_s))
            for number in self._signals():
                if number == signal.SIGHUP:
                    self._reload()
                elif not self._stop_at_s:
                    self._stop()
            if self._read_children() or (self._stop_at_s and time.monotonic() >= self._stop_at_s):
                return

    @property
    def _opener(self) -> start.Child:
        return self._children[0]

    def _signals(self) -> bytes:
        try:
            return os.read(self._wake_read, 64)
        except BlockingIOError:
            return b""

    def _read_children(self) -> bool:
        """What the children say; true when all have ended as they were told to."""
        for child in self._children:
            while True:
                data = child.link.receive()
                if data is None:
                    break
                if not data:
                    if not self._stop_at_s:
                        raise ServiceFailed(self._end_of(child))
                    with contextlib.suppress(FileNotFoundError):
                        self._epoll.unregister(child.link.fileno())
                        if child is self._opener:
                            self._stop_worker()
                    break
                match link.decode(_SAYS[child.name], data):
                    case link.Pong():
                        self._notify.tell(WATCHDOG=1)
                    case link.StopAsked() if not self._stop_at_s:
                        say("an administrator asks to stop")
                        self._stop()
                    case link.WorkerStuck():
                        say("the namespaces worker does not answer; it is started again", priority=4)
                        self._children[-1].link.send(link.RESTART)
                    case link.Applied(generation):
                        text = f"Serving with {self._options.policy}, reloaded {generation - 1} times"
                        self._notify.tell(READY=1, STATUS=text)
                        say(f"the policy is reloaded: {self._options.policy}")
        if not self._stop_at_s:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            for child in self._children:
                child.process.wait(0.02)
            return True
        return False

    def _stop_worker(self) -> None:
        """The opener has ended, so nobody asks the worker any more, whether it answers or not."""
        for child in self._children:
            if child.name == "namespaces":
                with contextlib.suppress(OSError):  # it has ended by itself
                    child.link.send(link.STOP)

    def _end_of(self, child: start.Child) -> str:
        """How a child ended, whose link is at its end; and others that have, for one may be the other's reason."""
        try:
            child.process.wait(1)
        except subprocess.TimeoutExpired:
            return f"the {child.name} closed its link and still runs"
        ends = []
        for one in self._children:
            code = one.process.poll()
            if code is not None:
                name = "namespaces worker's holder" if one.name == "namespaces" else one.name
                ends.append(f"the {name} ended with " + (f"signal {-code}" if code < 0 else f"exit code {code}"))
        return ", ".join(ends)

    def _reload(self) -> None:
        """Load the policy again; on any error the old one stays in force."""
        self._notify.tell(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
        try:
            policy, wanted = checked_policy(self._options.policy)
            check_reload(self._given, wanted)
            for warning in wanted.warnings:
                say(warning, priority=4)
        except Exception as error:  # noqa: BLE001 -- whatever a policy does to us, the running service goes on
            self._keep_policy(
                f"{type(error).__name__}: {error}" if not isinstance(error, FdbrokerError) else str(error)
            )
            return
        try:
            descriptor = memfd.sealed("policy", to_bytes(policy))
            try:
                sent = self._opener.link.send_with_descriptors(link.encode_policy(self._generation + 1), [descriptor])
            finally:
                os.close(descriptor)
        except OSError as error:  # no descriptors, or too many of root's in flight
            self._keep_policy(f"the opener cannot be told: {error}")
            return
        if sent:
            self._generation += 1
        else:
            self._keep_policy("the opener is busy, try again")

    def _keep_policy(self, why: str) -> None:
        say(f"the policy is NOT reloaded, the old one stays in force:\n{why}", priority=3)
        self._notify.tell(READY=1, STATUS="The last reload failed, the policy before it is in force")

    def _stop(self) -> None:
        self._notify.tell(STOPPING=1)
        # what is left of the five seconds is for the kernel: our end takes the children with us
        self._stop_at_s = time.monotonic() + limits.STOP_SECONDS - 0.5
        self._opener.link.send(link.STOP)


def serve(options: Options) -> int:
    """Run the service to its end; returns the exit code."""
    os.umask(0o022)
    try:
        Launcher(options).run()
    except FdbrokerError as error:
        say(str(error), priority=3)
        return error.exit_code
    except OSError as error:
        say(f"the service ends: {error}", priority=3)
        return errors.EX_OSERR
    return errors.EX_OK
