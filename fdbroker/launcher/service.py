"""The launcher's life: load, start, then signals, reload and watchdog until it stops.

Runs in: launcher. It reads nothing from any client; its children's links carry a few fixed words.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from typing import Any, NamedTuple, assert_never

from fdbroker import errors
from fdbroker.errors import FdbrokerError, Finding, PolicyError
from fdbroker.launcher import ends, listen, own, start
from fdbroker.launcher.broken import Refuser
from fdbroker.launcher.ends import ChildRefused, ServiceFailed
from fdbroker.launcher.handing import Handing, has_room
from fdbroker.launcher.journal import Journal
from fdbroker.launcher.needs import CapabilitiesMissing, check_reload, checked_policy
from fdbroker.launcher.notify import Notify
from fdbroker.launcher.renewed import renewed
from fdbroker.launcher.signals import Signals, Stopped
from fdbroker.limits import launcher as limits
from fdbroker.limits.opener import DESCRIPTORS_RESERVED
from fdbroker.policy import names
from fdbroker.policy.compiled import Policy, to_bytes
from fdbroker.wire import admin, codec, link
from fdbroker.wire import findings as told
from fdbroker.wire import launcher as words

_to_opener = link.LAUNCHER_TO_OPENER.encode
# What each child may say to us.
_SAYS: dict[str, codec.Table[Any]] = {
    "opener": link.OPENER_TO_LAUNCHER,
    "keeper": words.KEEPER_TO_LAUNCHER,
    "inbox": words.INBOX_TO_LAUNCHER,
    "namespaces": words.WORKER_TO_LAUNCHER,
    "witness": words.WITNESS_TO_LAUNCHER,
}
_STOP_LOOK_S = 0.05
# How often we look whether a child has ended that does not say so by its link, whether the journal is another one, and
# whether the databases of users and groups have changed.
_LOOK_S = 2.0
_PINGED = ("opener", "keeper")  # the opener asks the inbox


class Options(NamedTuple):
    """What `fdbroker serve` was told."""

    policy: str
    address: str
    mode: int
    group: str | None
    state: str


def say(text: str, priority: int = 6) -> None:
    """One message to standard error, which the service manager puts into the journal with that syslog(3) priority."""
    begin = f"<{priority}>" if "JOURNAL_STREAM" in os.environ else "fdbroker: "
    with contextlib.suppress(OSError):
        sys.stderr.write("".join(f"{begin}{line}\n" for line in text.split("\n")))
        sys.stderr.flush()


class Launcher:
    """The service. `run` returns when it was told to stop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._notify = Notify()
        self._journal = Journal()
        self._generation = 1
        self._reload_wanted = False
        self._reload_for: list[int] = []  # connections that wait for the next load
        self._applying: list[int] | None = None  # those that wait for the policy to be in force, while it is not yet
        self._handing = Handing()
        self._owed: deque[admin.Reloaded] = deque()  # how a reload ended, for each connection
        self._would_fail = ""  # why a reload would, which is said once
        self._silent: set[str] = set()  # children that have not answered the last Ping
        self._stop_at_s = 0.0
        self._children: list[start.Child] = []
        self._gone: set[str] = set()  # those whose link is at its end
        self._half_ended: set[str] = set()  # children that the last look found without their main thread
        self._epoll = select.epoll()
        self._signals = Signals()

    def run(self) -> None:
        """Serve. Raises PolicyError and CannotListen before anything is started, ServiceFailed afterwards."""
        options = self._options
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if descriptors != resource.RLIM_INFINITY and descriptors <= DESCRIPTORS_RESERVED:
            needed = DESCRIPTORS_RESERVED
            raise ServiceFailed(f"at most {descriptors} descriptors (ulimit -Hn) leave none for clients: over {needed}")
        listener = listen.inherited()
        try:
            self._signals.catch()
            while not self._children:
                try:
                    self._check()
                    listener = listener or listen.bound(options.address, options.mode, options.group)
                    self._start(listener)
                except FdbrokerError as error:
                    # what systemd has bound, clients may wait at: each of them would start a service that cannot run
                    waiting = error.exit_code == errors.EX_CONFIG and listener is not None and not listener.path
                    if self._children or not waiting or listener is None:
                        raise
                    if not self._refuse_until_mended(listener.sock, error):
                        return
            self._loop()
        except Stopped:
            pass  # before anybody was served
        finally:
            self._signals.ignore()
            if listener is not None:
                listener.sock.close()
                listener.remove()
            start.end(*self._children)
            self._notify.close()
            self._journal.close()

    def _check(self) -> None:
        """Load the policy. Raises PolicyError, or CapabilitiesMissing when this service could not serve it."""
        self._databases = names.databases()
        with self._signals.breaking_off():
            self._loaded, self._given = checked_policy(self._options.policy)
        missing = sorted((self._given.capabilities | (self._given.worker or frozenset())) - own.effective())
        if missing:
            hint = ": see /usr/share/doc/fdbroker/namespaces.conf" if self._given.worker is not None else ""
            raise CapabilitiesMissing(f"the policy needs {', '.join(missing)}, which this service may not have{hint}")

    def _start(self, listener: listen.Listener) -> None:
        """Start the children, and give up what that needed."""
        for warning in self._given.warnings:
            say(warning, priority=4)
        if not self._journal.await_place():
            raise ServiceFailed("there is no journal, and standard error is /dev/null: nothing would be recorded")
        if not listener.asked_credentials:
            say("who connected already is disconnected: add PassCredentials=yes to the socket's unit", priority=4)
        if not own.effective() >= start.WITNESS_NEEDS:
            say("without CAP_SYS_PTRACE nobody is shown to be an administrator: reload with SIGHUP", priority=4)
        options, journal = self._options, self._journal.sock
        policy = to_bytes(self._in_force(self._loaded.policy))
        self._children = start.start_children(listener.sock, policy, self._given, options.state, journal)
        listener.sock.close()  # the opener alone accepts
        self._child("keeper").tell(words.LAUNCHER_TO_KEEPER.encode(self._given.given))
        self._await_ready()
        if not own.confine_launcher(options.policy, listener.path):
            say("this kernel has no Landlock: only its capabilities limit what the opener can open", priority=4)
        self._notify.tell(READY=1, STATUS=f"Serving with {options.policy}")
        say(f"serving with {options.policy}")

    def _in_force(self, policy: Policy) -> Policy:
        """A policy that was loaded now."""
        return policy._replace(generation=self._generation, loaded_us=time.time_ns() // 1000)

    def _refuse_until_mended(self, listener: socket.socket, broken: FdbrokerError) -> bool:
        """Have everybody who connects told that the policy cannot be used, until it can: then true.

        The files are looked at before somebody is told so, and at a SIGHUP.
        Returns False when told to stop; raises what is wrong BROKEN_SECONDS after the last client.
        """
        say(f"nobody is served until this is mended:\n{broken}", priority=3)
        self._notify.tell(STATUS="The policy cannot be used, and nobody is served: fdbroker policy check")
        with Refuser(listener) as refuser:
            while refuser.wait(self._signals.fileno()):
                signals = self._signals.read()
                if any(number != signal.SIGHUP for number in signals):
                    return False
                asked = refuser.is_asked()
                if not asked and not signals:
                    continue
                self._notify.tell(EXTEND_TIMEOUT_USEC=3_000_000 * limits.BROKEN_SECONDS)  # sd_notify(3)
                try:
                    self._check()
                except FdbrokerError as error:
                    if signals or str(error) != str(broken):
                        say(f"this is to be mended:\n{error}", priority=3)
                    broken = error
                    if asked:
                        refuser.go_on()
                else:
                    return True
        if not isinstance(broken, PolicyError | CapabilitiesMissing):
            raise broken
        self._check()  # the files may have been mended since somebody was refused
        return True

    # ---- start

    def _await_ready(self) -> None:
        """Wait for all children to be confined and to serve."""
        self._epoll.register(self._signals, select.EPOLLIN)
        for child in self._children:
            child.link.poll(self._epoll)
        deadline_s = time.monotonic() + limits.START_SECONDS
        missing = {child.name for child in self._children}
        while missing:
            if time.monotonic() > deadline_s:
                raise ServiceFailed(f"{' and '.join(sorted(missing))} did not come up in {limits.START_SECONDS} s")
            self._epoll.poll(0.5)
            for child in self._children:
                data = child.link.receive()
                if data == b"":
                    how = ends.end_of(child, self._children)
                    refused = any(one.process.poll() == errors.EX_CONFIG for one in self._children)
                    raise ChildRefused(how) if refused else ServiceFailed(how)
                if data is not None:
                    _SAYS[child.name].decode(data)
                    missing.discard(child.name)

    # ---- run

    def _look(self) -> None:
        """A process can end without its links: when one of its threads waits in the kernel. Raises ServiceFailed.

        The main thread of every process that ends is gone a moment before the process is: so two looks must find it so.
        """
        self._handing.look()
        before, self._half_ended = self._half_ended, set()
        for child in self._children:
            if child.process.poll() is None and ends.main_thread_ended(child.process.pid):
                if child.name in before:
                    raise ServiceFailed(f"the {child.name} has ended, but for a thread that waits in the kernel")
                self._half_ended.add(child.name)

    def _loop(self) -> None:
        watchdog_s = self._notify.watchdog_s
        look_at_s = time.monotonic()
        ping_at_s = time.monotonic() if watchdog_s else 0.0
        while True:
            now_s = time.monotonic()
            if watchdog_s and now_s >= ping_at_s:
                ping_at_s = now_s + watchdog_s
                self._silent = {*_PINGED}
                for name in () if self._stop_at_s else _PINGED:  # when it stops, they end one by one
                    self._child(name).tell(link.PING)
            if now_s >= look_at_s:
                look_at_s = now_s + _LOOK_S
                if not self._stop_at_s:  # then every process is to end, in its own time until `_stop_at_s`
                    self._look()
                self._journal.look()
                self._read_databases()
            ends_s = [at_s for at_s in (look_at_s, ping_at_s, self._stop_at_s) if at_s]
            if self._stop_at_s:
                ends_s.append(now_s + _STOP_LOOK_S)  # a child's link has ended a moment before it
            self._write(max(0.0, min(ends_s) - now_s))
            for number in self._signals.read():
                if number == signal.SIGHUP:
                    self._reload_wanted = True
                elif not self._stop_at_s:
                    self._stop()
            ended = self._read_children()
            if self._reload_wanted and self._handing.can(self._children) and not self._stop_at_s:
                self._reload()
            if ended:
                return
            if self._stop_at_s and time.monotonic() >= self._stop_at_s:
                if late := ends.late(self._children):
                    say(late, priority=4)
                return

    @property
    def _opener(self) -> start.Child:
        return self._children[0]

    def _write(self, timeout_s: float) -> None:
        """Wait until there is something to read, and send what waits as far as there is room."""
        while self._owed and not self._opener.link.waiting:  # each can be as long as a message may be
            self._opener.tell(_to_opener(self._owed.popleft()))
        present = [child for child in self._children if child.name not in self._gone]
        for child in present:
            child.link.poll(self._epoll, write=self._reload_wanted and not has_room(child.link))
        ready = dict(self._epoll.poll(timeout_s))
        for child in present:
            if ready.get(child.link.fileno(), 0) & select.EPOLLOUT:
                with contextlib.suppress(OSError):  # it has ended, as is read next
                    child.link.flush()

    def _child(self, name: str) -> start.Child:
        return next(child for child in self._children if child.name == name)

    def _read_children(self) -> bool:
        """What the children say; true when all have ended as they were told to."""
        for child in self._children:
            while child.name not in self._gone:
                received = child.link.receive_with_descriptors(1 if child is self._opener else 0)
                if received is None:
                    break
                data, descriptors = received
                if not data:
                    if not self._stop_at_s:
                        raise ServiceFailed(ends.end_of(child, self._children))
                    self._gone.add(child.name)
                    self._epoll.unregister(child.link.fileno())
                    if child is self._opener:
                        self._stop_others()
                    break
                try:
                    self._heard(child.name, _SAYS[child.name].decode(data), data, descriptors)
                finally:
                    for descriptor in descriptors:
                        os.close(descriptor)
        if not self._stop_at_s:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            for child in self._children:
                child.process.wait(0.02)
            return True
        return False

    def _heard(self, name: str, message: link.ToLauncher | admin.Judged, data: bytes, descriptors: list[int]) -> None:
        match message:
            case link.Pong():
                self._silent.discard(name)
                if not self._silent:
                    self._notify.tell(WATCHDOG=1)
            case link.StopAsked():
                if not self._stop_at_s:
                    say("an administrator asks to stop")
                    self._stop()
            case admin.Judge():
                try:
                    told = self._child("witness").link.send_with_descriptors(data, descriptors)
                except OSError:  # it has ended, or too many of root's descriptors are in flight
                    told = False
                if not told:
                    self._opener.tell(_to_opener(admin.Judged(message.connection, False)))
            case admin.Judged():
                self._opener.tell(data)
            case admin.ReloadAsked(connection):
                self._reload_for.append(connection)
                self._reload_wanted = True
            case link.WorkerStuck():
                for child in (one for one in self._children if one.name == "namespaces"):
                    say("the namespaces worker does not answer; it is started again", priority=4)
                    child.tell(words.RESTART)
            case link.Applied(number):
                # for what changed users or groups make of the policy, nobody waits
                if self._handing.taken(name, number) and self._applying is not None:
                    text = f"Serving with {self._options.policy}, reloaded {self._generation - 1} times"
                    self._notify.tell(READY=1, STATUS=text)
                    say(f"the policy is reloaded: {self._options.policy}")
                    self._tell_reloaded(self._applying, [])
                    self._applying = None
            case link.Ready():
                pass
            case other:
                assert_never(other)

    def _tell_reloaded(self, connections: list[int], findings: list[Finding]) -> None:
        self._owed.extend(admin.Reloaded(connection, told.to_bytes(findings)) for connection in connections)

    def _stop_others(self) -> None:
        """The opener has ended, so nobody asks the others any more, whether they answer or not. The keeper sees it."""
        for child in self._children:
            if child.name in ("namespaces", "witness"):
                child.tell(words.STOP)

    def _reload(self) -> None:
        """Load the policy again; on any error the old one stays in force. Those who asked for it are told."""
        self._reload_wanted = False
        asked, self._reload_for = self._reload_for, []
        self._notify.tell(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
        databases = names.databases()
        try:
            with self._signals.breaking_off():
                loaded, wanted = checked_policy(self._options.policy)
                check_reload(self._given, wanted)
            for warning in wanted.warnings:
                say(warning, priority=4)
        except Stopped:
            self._tell_reloaded(asked, [Finding(self._options.policy, 0, 0, "the service is told to stop")])
            return
        except PolicyError as error:
            self._keep_policy(error.findings, asked)
            return
        except Exception as error:  # noqa: BLE001 -- whatever a policy does to us, the running service goes on
            why = str(error) if isinstance(error, FdbrokerError) else f"{type(error).__name__}: {error}"
            self._keep_policy([Finding(self._options.policy, 0, 0, why)], asked)
            return
        self._generation += 1
        loaded = loaded._replace(policy=self._in_force(loaded.policy))
        why = self._handing.give(self._children, loaded.policy)
        if why:
            self._generation -= 1
            self._keep_policy([Finding(self._options.policy, 0, 0, why)], asked)
        else:
            self._databases, self._loaded, self._applying = databases, loaded, asked

    def _read_databases(self) -> None:
        """When users, groups or subordinate uids have changed, compile the policy in force with the new ones.

        The policy's files are not read again: whatever stands in them now is for a reload. Nothing is handed on when
        all comes out as before: every user can change its line of passwd(5), by chsh(1), as often as it likes.
        """
        found = names.databases()
        if found == self._databases or self._stop_at_s or not self._handing.can(self._children):
            return
        before = self._loaded.policy
        try:
            with self._signals.breaking_off():
                loaded, why = renewed(self._options.policy, self._loaded)
        except Stopped:
            return
        if why and why != self._would_fail:
            say(f"users or groups have changed, and a reload would now fail:\n{why}", priority=4)
        self._would_fail = why
        if loaded.policy == before or not self._handing.give(self._children, loaded.policy):  # else the next time
            self._databases, self._loaded = found, loaded

    def _keep_policy(self, findings: list[Finding], asked: list[int]) -> None:
        why = "\n".join(map(str, findings))
        say(f"{errors.NOT_RELOADED}:\n{why}", priority=3)
        self._notify.tell(READY=1, STATUS="The last reload failed, the policy before it is in force")
        self._tell_reloaded(asked, findings)

    def _stop(self) -> None:
        self._notify.tell(STOPPING=1)
        # what is left of the five seconds is for the kernel: our end takes the children with us
        self._stop_at_s = time.monotonic() + limits.STOP_SECONDS - 0.5
        for child in (one for one in self._children if one.name in ("opener", "keeper")):
            child.tell(words.STOP)


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
