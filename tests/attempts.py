"""What an attacker would try who has taken over a process of the broker: the one table of it.

Runs in: the very processes of the broker, behind their confinement (tests/takeover.py), and for control in a process of
root's without any. The standard library only, all of it imported before: nothing can be afterwards.

An attempt raises OSError when it is refused. `accepted` says why it is possible where it is, by process; test and document
have it from here. A new line here needs a new record: tests/privileged/test_confinement.py says how.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

libc = ctypes.CDLL(None, use_errno=True)

# asm/unistd_64.h; what is tried by its number, for Python has no function for it, or one that does more
_WORDS = """
    mprotect=10 ioctl=16 shmget=29 shmctl=31 clone=56 fork=57 kill=62 semget=64 semctl=66 msgget=68 msgctl=71
    ptrace=101 syslog=103 setfsuid=122 capset=126 rt_sigqueueinfo=129 personality=135 setpriority=141
    sched_setscheduler=144 vhangup=153 modify_ldt=154 pivot_root=155 prctl=157 adjtimex=159 acct=163
    settimeofday=164 mount=165 umount2=166 swapon=167 swapoff=168 reboot=169 sethostname=170 setdomainname=171
    iopl=172 ioperm=173 init_module=175 delete_module=176 quotactl=179 tkill=200 sched_setaffinity=203
    clock_settime=227 tgkill=234 mq_open=240 mq_unlink=241 kexec_load=246 add_key=248 request_key=249 keyctl=250
    ioprio_set=251 inotify_add_watch=254
    unshare=272 inotify_init1=294 perf_event_open=298 fanotify_init=300 prlimit64=302 name_to_handle_at=303
    open_by_handle_at=304 setns=308 process_vm_readv=310 process_vm_writev=311 kcmp=312 finit_module=313 seccomp=317
    memfd_create=319 kexec_file_load=320 bpf=321 execveat=322 userfaultfd=323 pidfd_send_signal=424
    io_uring_setup=425 open_tree=428 move_mount=429 fsopen=430 pidfd_open=434 clone3=435 openat2=437 pidfd_getfd=438
    process_madvise=440 mount_setattr=442 landlock_create_ruleset=444 landlock_add_rule=445
    landlock_restrict_self=446 memfd_secret=447
"""
NUMBERS = {name: int(number) for name, _, number in (word.partition("=") for word in _WORDS.split())}
CLONE = {"user": 0x10000000, "mount": 0x20000, "net": 0x40000000, "pid": 0x20000000}
CLONE |= {"uts": 0x4000000, "ipc": 0x8000000, "cgroup": 0x2000000, "time": 0x80}
ANOTHER = 4711  # a uid and gid that is nobody's
_BUFFER = ctypes.create_string_buffer(4096)


def _queue() -> bytes:
    """The name of a message queue: of each process another one, for they try it at the same time."""
    return f"fdbroker-tried-{os.getpid()}".encode()


def sc(name: str | int, *arguments: Any) -> int:
    """One system call. Raises OSError."""
    number = NUMBERS[name] if isinstance(name, str) else name
    plain = [one.fileno() if isinstance(one, Missing) else one for one in arguments]
    filled = [ctypes.c_long(one) if isinstance(one, int) else one for one in plain]
    result: int = libc.syscall(ctypes.c_long(number), *filled)
    if result < 0:
        raise OSError(ctypes.get_errno(), str(name))
    return result


class Missing:
    """In the place of what could not even be made as root: under a unit's sandbox, or in this kernel."""

    def __init__(self, error: OSError) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise OSError(self._error.errno, self._error.strerror)

    def __call__(self) -> int:
        raise OSError(self._error.errno, self._error.strerror)

    def fileno(self) -> int:
        raise OSError(self._error.errno, self._error.strerror)


def _given(make: Callable[..., Any], *words: Any) -> Any:
    try:
        return make(*words)
    except OSError as error:
        return Missing(error)


class World:
    """What the attempts are about; descriptors that they need are made before the confinement, as root."""

    def __init__(self, plan: dict[str, Any], role: str) -> None:
        self.same: int = plan["same"][role]  # the real one, of the same user as this
        self.others = [pid for pid in plan["pids"].values() if pid != self.same]  # of the broker, and somebody's
        self.folder: str = plan["folders"][role]  # everybody may write to it, and to the file `public` in it
        self.mine = f"{self.folder}/mine"  # a file of this process's own user
        self.state = (
            f"{plan['state']}/{role}"  # what it makes where messages are stored; no other attempt uses the name
        )
        self.allowed: list[int] = plan["capabilities"][role]  # numbers of those that it has permitted
        self.pidfds = [os.pidfd_open(pid) for pid in self.others]
        spaces = {kind: f"/proc/{plan['pids']['victim']}/ns/{file}" for kind, file in _FILES.items()}
        self.spaces = {kind: _given(os.open, path, os.O_RDONLY) for kind, path in spaces.items()}
        self.unix = socket.socket(socket.AF_UNIX)
        self.datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.inet = _given(socket.socket, socket.AF_INET)
        self.host = os.uname().nodename.encode()
        self.open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        self.executable = os.open("/bin/echo", os.O_RDONLY)
        self.program = Path("/bin/echo").read_bytes()
        self.terminal = _given(lambda: os.openpty()[1])
        self.getpid_32 = _given(getpid_32)
        self.mount_id = ctypes.c_int()
        # struct file_handle: size, type, the handle
        self.handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
        _given(sc, "name_to_handle_at", -100, b"/etc/shadow", self.handle, ctypes.byref(self.mount_id), 0)
        self.file_system = os.open("/etc", os.O_RDONLY)


_FILES = {"net": "net", "mount": "mnt", "pid": "pid", "user": "user"}

How = Callable[[World], Any]


# Processes that are confined alike: `accepted` may name either.
ALIKE = {"holder": "namespaces", "worker": "namespaces", "child": "namespaces", "inbox-store": "inbox"}


class Attempt(NamedTuple):
    """`how` raises OSError when it is refused. `accepted` is why it may be possible: for "all", or by process."""

    name: str
    calls: str
    how: How
    accepted: dict[str, str] = {}

    def reason(self, role: str) -> str:
        """Why it may be possible there, "" when it must not be."""
        return next((self.accepted[one] for one in (role, ALIKE.get(role), "all") if one in self.accepted), "")


# ---- how, where it takes more than a line


def any_of(targets: Iterable[Any], how: Callable[[Any], Any]) -> None:
    """It is possible if it is for one of them."""
    refused = OSError(errno.EINVAL, "nothing to try")
    for one in targets:
        try:
            how(one)
        except OSError as error:
            refused = error
        else:
            return
    raise refused


def reaches(how: Callable[[], Any], *judged: int) -> None:
    """An error that only comes once it was allowed is none: one of `judged`."""
    try:
        how()
    except OSError as error:
        if error.errno not in judged:
            raise


def must(condition: object, number: int = errno.EPERM) -> None:
    """What the kernel has no error for."""
    if not condition:
        raise OSError(number, "it had no effect")


def opening(path: str, flags: int) -> None:
    os.close(os.open(path, flags | os.O_CLOEXEC, 0o600))


def process(how: Callable[[], int]) -> None:
    """A process is started, and ends at once."""
    child = how()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def executed(how: Callable[[], Any]) -> None:
    """Ends in another program, which says for us that it runs."""
    how()
    raise AssertionError("exec came back")


def in_memory(w: World) -> None:
    program = sc("memfd_create", b"program", 0)
    os.write(program, w.program)
    executed(lambda: execveat(program))


def execveat(program: int) -> None:
    words = (ctypes.c_char_p * 3)(b"echo", b"ok", None)
    sc("execveat", program, b"", words, (ctypes.c_char_p * 1)(None), 0x1000)


def vectors(call: str, pid: int) -> None:
    """No address of another is known here, and none is needed to see that it may be asked for."""
    ours, theirs = struct.pack("QQ", ctypes.addressof(_BUFFER), 1), struct.pack("QQ", 0x10, 1)
    reaches(lambda: sc(call, pid, ours, 1, theirs, 1, 0), errno.EFAULT)


def own_thread() -> None:
    thread = threading.Thread(target=int)
    try:
        thread.start()
    except RuntimeError:
        raise OSError(errno.EPERM, "clone") from None
    thread.join()


def regained(w: World, *, inheritable: bool = False) -> None:
    def one(number: int) -> None:
        bits = [1 << number >> 32 * half & 0xFFFFFFFF for half in (0, 1)]
        data = struct.pack("6I", *(value for bit in bits for value in (bit, bit, bit if inheritable else 0)))
        sc("capset", struct.pack("Ii", 0x20080522, 0), data)

    any_of(range(41) if inheritable else sorted(set(range(41)) - set(w.allowed)), one)


def without_landlock(w: World) -> None:
    """A rule set of one's own that allows everything, on top of the one that is in force."""
    rules = sc("landlock_create_ruleset", struct.pack("Q", 0x4), 8, 0)  # READ_FILE
    root = os.open("/", os.O_PATH)
    sc("landlock_add_rule", rules, 1, struct.pack("=Qi", 0x4, root), 0)
    libc.prctl(38, 1, 0, 0, 0)
    sc("landlock_restrict_self", rules, 0)
    opening(f"{w.folder}/public", os.O_RDONLY)


def without_seccomp() -> None:
    """A filter of one's own that allows everything, on top of the one that is in force."""
    libc.prctl(38, 1, 0, 0, 0)
    allow = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000), 8)
    sc("seccomp", 1, 0, ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 1, ctypes.addressof(allow)), 16))


def getpid_32() -> Callable[[], int]:
    """A call of getpid() of the 32-bit kernel interface: mov eax, 20; int 0x80; ret."""
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\xb8\x14\0\0\0\xcd\x80\xc3")
    place = (ctypes.c_char * 8).from_buffer(code)
    call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(place))
    return lambda: (call(), place)[0]


def executable_memory() -> None:
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC):
        pass


def made_executable() -> None:
    with mmap.mmap(-1, 4096) as code:
        place = (ctypes.c_char * 8).from_buffer(code)
        try:
            sc("mprotect", ctypes.addressof(place), 4096, 5)
        finally:
            del place


def shared(get: Callable[[], int], remove: Callable[[int], Any]) -> None:
    remove(get())


def fast_open(w: World) -> None:
    """Connect a TCP socket without connect(2)."""
    reaches(lambda: w.inet.sendto(b"x", 0x20000000, ("127.0.0.1", 9)), errno.ECONNREFUSED, errno.ENETUNREACH)


def prctl(*arguments: int) -> int:
    return sc("prctl", *arguments)


def no_new_privs_off() -> None:
    """The kernel never takes 0 for it; for control there is a process that never had it on."""
    reaches(lambda: prctl(38, 0, 0, 0, 0), errno.EINVAL)
    must(prctl(39, 0, 0, 0, 0) == 0, errno.EINVAL)


def ambient(w: World) -> None:
    """It must be inheritable first."""
    with contextlib.suppress(OSError):
        regained(w, inheritable=True)
    prctl(47, 2, 0, 0, 0)


def own_limit(kind: int, value: int) -> None:
    sc("prlimit64", 0, kind, struct.pack("QQ", value, value), None)


def limits_of(pid: int) -> None:
    """To learn them takes the same right as to set them."""
    sc("prlimit64", pid, resource.RLIMIT_CORE, None, ctypes.create_string_buffer(16))


def set_clock() -> None:
    """To what it is."""
    now_ns = time.clock_gettime_ns(time.CLOCK_REALTIME)
    sc("clock_settime", 0, struct.pack("qq", *divmod(now_ns, 10**9)))


# ---- why some of it is possible. Of the launcher: it reads nothing that a client wrote.

_LAUNCHER = "it keeps root's uid, to read the policy and NSS again"
_CHILDREN = {"launcher": "NSS may; what it starts has what it has: no capability, the same filter and Landlock rules"}
_HARMLESS = {"launcher": "it has no list of what it may do; this gives it no right that it has not"}
_FORKS = {"namespaces": "each question is answered in a process of its own", **_CHILDREN}
_THREADS = {
    "opener": "nodes of drivers that may sleep are opened and closed in threads",
    "inbox": "what came with messages is closed in threads",
    "refuser": "what refused clients have sent is closed in threads",
    **_CHILDREN,
}
_COLLECTS = {"inbox": "one that is closed at once has the kernel free others"}
_MAKES = {"namespaces": "that is what it is for"}
_NETWORK = {
    "namespaces": "it makes sockets for others, and asks the kernel by NETLINK",
    "launcher": "NSS may ask others",
}
_NSS = {"launcher": "NSS may ask others"}
_LOOK = {
    "witness": "CAP_SYS_PTRACE is for the user namespaces of administrators",
    "namespaces": "CAP_SYS_PTRACE is for the namespaces of clients' processes, CAP_DAC_READ_SEARCH for what they have open",
}
_LIST = {
    "namespaces": _LOOK["namespaces"],  # the witness opens what it has the name of, and lists nothing
    "launcher": f"{_LAUNCHER}; it sees their numbers, not what they are",
}
_READ = {
    "namespaces": "it has no Landlock, which would keep it from opening namespaces, and CAP_DAC_READ_SEARCH",
    "witness": "it has root's uid and no Landlock, or it could not look at namespaces; it reads nothing but the launcher's pidfds",
}
_LIST_FOLDERS = {"namespaces": _READ["namespaces"]}
_LIST_DEVICES = {
    **_LIST_FOLDERS,
    "keeper": "that is what it is for",
    "launcher": "a reload looks at the nodes that the rules name, and opens none",
}
_READ_ETC = {**_READ, "launcher": f"{_LAUNCHER}, and Landlock leaves it /etc"}
_SIGNALS = {"namespaces": "processes of its own user only: it ends its children"}
_ITS_OWN_LIMITS = {"all": "processes of its own user only, which are itself"}
_NO_LANDLOCK_RIGHT = {"all": "Landlock has no right for it: permissions hold, but for a capability that it keeps"}
_DATAGRAM = {"all": "with a datagram socket that it has, such as the journal's: no filter sees the address"}

# ---- the table


# fmt: off
TABLE: dict[str, list[Attempt]] = {
    "programs and processes": [
        Attempt("start a program", "execve", lambda w: executed(lambda: os.execv("/bin/echo", ["echo", "ok"]))),
        Attempt("start a program that is open", "execveat", lambda w: executed(lambda: execveat(w.executable))),
        Attempt("start a program from memory", "memfd_create execveat", in_memory),
        Attempt("become another user by a set-uid program", "execve", lambda w: executed(lambda: os.execv(f"{w.folder}/set-uid", ["id", "-u"]))),
        Attempt("start a process as the C library does", "clone", lambda w: process(os.fork), _FORKS),
        Attempt("start a process by fork", "fork", lambda w: process(lambda: sc("fork"))),
        Attempt("start a process by clone3", "clone3", lambda w: process(lambda: sc("clone3", struct.pack("11Q", 0, 0, 0, 0, 17, *[0] * 6), 88))),
        Attempt("start a thread", "clone", lambda w: own_thread(), _THREADS),
        Attempt("make memory executable that was written", "mprotect", lambda w: made_executable(), _HARMLESS),
        Attempt("have memory writable and executable", "mmap", lambda w: executable_memory(), _HARMLESS),
        Attempt("call the kernel as a 32-bit program", "int0x80", lambda w: must(w.getpid_32() > 0, errno.ENOSYS)),
        Attempt("a memfd", "memfd_create", lambda w: os.close(sc("memfd_create", b"x", 0)), _HARMLESS),
        Attempt("secret memory", "memfd_secret", lambda w: os.close(sc("memfd_secret", 0))),
    ],
    "namespaces": [
        *(
            Attempt(f"a new {kind} namespace", "unshare", lambda w, flag=flag: sc("unshare", flag), {} if kind in ("user", "pid") else _MAKES)
            for kind, flag in CLONE.items()
        ),
        Attempt("a process in a new user namespace", "clone", lambda w: process(lambda: sc("clone", 0x10000011, 0, 0, 0, 0))),
        *(
            Attempt(f"enter a {kind} namespace", "setns", lambda w, kind=kind: sc("setns", w.spaces[kind], CLONE[kind]), {} if kind == "pid" else _MAKES)
            for kind in _FILES
        ),
        Attempt("enter a namespace of whatever type", "setns", lambda w: sc("setns", w.spaces["net"], 0)),
    ],
    "other processes": [
        Attempt("trace a process of the broker", "ptrace", lambda w: any_of(w.others, lambda pid: sc("ptrace", 0x4206, pid, 0, 0))),
        Attempt("trace a process of its own user", "ptrace", lambda w: sc("ptrace", 0x4206, w.same, 0, 0)),
        Attempt("read memory", "process_vm_readv", lambda w: any_of([*w.others, w.same], lambda pid: vectors("process_vm_readv", pid))),
        Attempt("write memory", "process_vm_writev", lambda w: any_of([*w.others, w.same], lambda pid: vectors("process_vm_writev", pid))),
        Attempt("read memory by /proc/PID/mem", "openat", lambda w: any_of([*w.others, w.same], lambda pid: opening(f"/proc/{pid}/mem", os.O_RDONLY)), _LOOK),
        Attempt("write memory by /proc/PID/mem", "openat", lambda w: any_of([*w.others, w.same], lambda pid: opening(f"/proc/{pid}/mem", os.O_WRONLY))),
        Attempt("list descriptors in /proc/PID/fd", "openat getdents64", lambda w: any_of([*w.others, w.same], lambda pid: os.listdir(f"/proc/{pid}/fd")), _LIST),
        Attempt("open a descriptor in /proc/PID/fd", "openat", lambda w: any_of([*w.others, w.same], lambda pid: opening(f"/proc/{pid}/fd/2", os.O_RDONLY)), _LOOK),
        Attempt("read /proc/PID/environ", "openat", lambda w: any_of([*w.others, w.same], lambda pid: opening(f"/proc/{pid}/environ", os.O_RDONLY)), _LOOK),
        Attempt("go through the root folder of another", "openat", lambda w: any_of([*w.others, w.same], lambda pid: opening(f"/proc/{pid}/root/etc/hostname", os.O_RDONLY)), _LOOK),
        Attempt("open a namespace in /proc/PID/ns", "openat", lambda w: any_of([*w.others, w.same], lambda pid: opening(f"/proc/{pid}/ns/net", os.O_RDONLY)), _LOOK),
        Attempt("refer to a process", "pidfd_open", lambda w: any_of(w.others, lambda pid: os.close(os.pidfd_open(pid))), {"namespaces": "to know that it is still the same", "opener": "whose process it is, before Linux 6.5", **_HARMLESS}),
        Attempt("take a descriptor", "pidfd_getfd", lambda w: any_of(w.pidfds, lambda pidfd: os.close(sc("pidfd_getfd", pidfd, 2, 0)))),
        Attempt("signal a process of the broker", "kill", lambda w: any_of(w.others, lambda pid: sc("kill", pid, 0)), _SIGNALS),
        Attempt("signal a process of its own user", "kill", lambda w: sc("kill", w.same, 0), _SIGNALS),
        Attempt("signal a thread", "tgkill", lambda w: any_of([*w.others, w.same], lambda pid: sc("tgkill", pid, pid, 0))),
        Attempt("signal a thread by its number", "tkill", lambda w: any_of([*w.others, w.same], lambda pid: sc("tkill", pid, 0))),
        Attempt("signal with a value", "rt_sigqueueinfo", lambda w: any_of([*w.others, w.same], lambda pid: sc("rt_sigqueueinfo", pid, 0, struct.pack("iii116x", 0, 0, -1)))),
        Attempt("signal by a pidfd", "pidfd_send_signal", lambda w: any_of(w.pidfds, lambda pidfd: sc("pidfd_send_signal", pidfd, 0, None, 0))),
        Attempt("change the limits of another", "prlimit64", lambda w: any_of(w.others, limits_of)),
        Attempt("change the limits of its own user's", "prlimit64", lambda w: limits_of(w.same), _ITS_OWN_LIMITS),
        Attempt("change the priority of another", "setpriority", lambda w: any_of(w.others, lambda pid: sc("setpriority", 0, pid, 0))),
        Attempt("change the scheduling of another", "sched_setscheduler", lambda w: any_of(w.others, lambda pid: sc("sched_setscheduler", pid, 0, struct.pack("i", 0)))),
        Attempt("change the processors of another", "sched_setaffinity", lambda w: any_of(w.others, lambda pid: sc("sched_setaffinity", pid, 128, b"\xff" * 128))),
        Attempt("change the disk priority of another", "ioprio_set", lambda w: any_of(w.others, lambda pid: sc("ioprio_set", 1, pid, 2 << 13 | 4))),
        Attempt("advise on another's memory", "process_madvise", lambda w: any_of(w.pidfds, lambda pidfd: sc("process_madvise", pidfd, struct.pack("QQ", 0, 0), 0, 20, 0))),
        Attempt("compare what others have open", "kcmp", lambda w: any_of(w.others, lambda pid: sc("kcmp", w.same, pid, 2, 0, 0)), {"namespaces": "which threads of a client have a table of descriptors of their own"}),
        Attempt("watch another by events", "perf_event_open", lambda w: any_of(w.others, lambda pid: os.close(sc("perf_event_open", struct.pack("IIQ112x", 1, 128, 0), pid, -1, -1, 0)))),
    ],
    "files": [
        Attempt("read /etc/shadow", "openat", lambda w: opening("/etc/shadow", os.O_RDONLY), _READ_ETC),
        Attempt("read a file that everybody may", "openat", lambda w: opening(f"{w.folder}/public", os.O_RDONLY), _READ ),
        Attempt("read it by openat2", "openat2", lambda w: os.close(sc("openat2", -100, f"{w.folder}/public".encode(), struct.pack("QQQ", 0, 0, 0), 24))),
        Attempt("read a file of root's", "openat", lambda w: opening(f"{w.folder}/secret", os.O_RDONLY), _READ),
        Attempt("write to a file that everybody may", "openat", lambda w: opening(f"{w.folder}/public", os.O_WRONLY)),
        Attempt("write to it by openat2", "openat2", lambda w: os.close(sc("openat2", -100, f"{w.folder}/public".encode(), struct.pack("QQQ", 1, 0, 0), 24))),
        Attempt("write to a file of its own user's", "openat", lambda w: opening(w.mine, os.O_WRONLY)),
        Attempt("write to a file of root's", "openat", lambda w: opening(f"{w.folder}/secret", os.O_WRONLY)),
        Attempt("make a file", "openat", lambda w: opening(f"{w.folder}/new", os.O_WRONLY | os.O_CREAT)),
        Attempt("make a file where messages are stored", "openat", lambda w: opening(f"{w.state}-new", os.O_WRONLY | os.O_CREAT), {"inbox-store": "SQLite makes its files there"}),
        Attempt("make a folder", "mkdir", lambda w: os.mkdir(f"{w.folder}/new-folder")),
        Attempt("make a link", "symlink", lambda w: os.symlink("/etc/shadow", f"{w.folder}/new-link")),
        Attempt("make a link where messages are stored", "symlink", lambda w: os.symlink("/etc/shadow", f"{w.state}-new-link")),
        Attempt("make a hard link", "link", lambda w: os.link(w.mine, f"{w.mine}-2")),
        Attempt("make a device node", "mknod", lambda w: os.mknod(f"{w.folder}/node", 0o020666, os.makedev(1, 5))),
        Attempt("rename a file", "rename", lambda w: os.rename(w.mine, f"{w.mine}-2")),
        Attempt("remove a file", "unlink", lambda w: os.unlink(w.mine)),
        Attempt("truncate a file", "truncate", lambda w: os.truncate(w.mine, 0)),
        Attempt("make its own file set-uid", "chmod", lambda w: os.chmod(w.mine, 0o4755), _NO_LANDLOCK_RIGHT),
        Attempt("give its own file away", "chown", lambda w: os.chown(w.mine, ANOTHER, -1)),
        Attempt("date its own file", "utimensat", lambda w: os.utime(w.mine, (0, 0)), _NO_LANDLOCK_RIGHT),
        Attempt("note an attribute at its own file", "setxattr", lambda w: os.setxattr(w.mine, "trusted.a", b"b")),
        Attempt("open the device of a rule", "openat", lambda w: opening("/dev/lab/allowed", os.O_RDWR), {"opener": "the policy's own"}),
        Attempt("open another device", "openat", lambda w: opening("/dev/other", os.O_RDWR)),
        Attempt("read another device", "openat", lambda w: opening("/dev/other", os.O_RDONLY), _READ),
        Attempt("read another device by openat2", "openat2", lambda w: os.close(sc("openat2", -100, b"/dev/other", struct.pack("QQQ", 0, 0, 0), 24))),
        Attempt("list the folder of a rule", "openat getdents64", lambda w: os.listdir("/dev/lab"), _LIST_DEVICES),
        Attempt("list another folder", "openat getdents64", lambda w: os.listdir(w.folder), _LIST_FOLDERS),
        Attempt("open a device by a node of its own user's", "openat", lambda w: opening(f"{w.mine}-node", os.O_RDWR)),
        Attempt("change a setting of the kernel", "openat", lambda w: opening("/proc/sys/kernel/core_pattern", os.O_WRONLY) ),
        Attempt("learn whether a file exists", "newfstatat", lambda w: os.stat(f"{w.folder}/public"), _NO_LANDLOCK_RIGHT ),
        Attempt("refer to a file without reading it", "openat", lambda w: opening(f"{w.folder}/secret", os.O_PATH), _NO_LANDLOCK_RIGHT),
        Attempt("watch a folder", "inotify_add_watch", lambda w: sc("inotify_add_watch", sc("inotify_init1", 0), w.folder.encode(), 2), _NO_LANDLOCK_RIGHT),
        Attempt("watch a file system", "fanotify_init", lambda w: os.close(sc("fanotify_init", 0, 0))),
        Attempt("name a file by its handle", "name_to_handle_at", lambda w: sc("name_to_handle_at", -100, b"/etc/hostname", ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136), ctypes.byref(w.mount_id), 0), _HARMLESS),
        Attempt("open a file by its handle", "open_by_handle_at", lambda w: os.close(sc("open_by_handle_at", w.file_system, w.handle, 0))),
        Attempt("loosen Landlock by rules of its own", "landlock_restrict_self", without_landlock),
        Attempt("another root folder", "chroot", lambda w: os.chroot(w.folder)),
        Attempt("another root file system", "pivot_root", lambda w: reaches(lambda: sc("pivot_root", b"/", b"/"), errno.EBUSY, errno.EINVAL)),
        Attempt("mount", "mount", lambda w: sc("mount", b"none", w.folder.encode(), b"tmpfs", 0, None)),
        Attempt("unmount", "umount2", lambda w: reaches(lambda: sc("umount2", w.folder.encode(), 0), errno.EINVAL)),
        Attempt("copy a mount", "open_tree", lambda w: os.close(sc("open_tree", -100, b"/", 1))),
        Attempt("prepare a file system", "fsopen", lambda w: os.close(sc("fsopen", b"tmpfs", 0))),
        Attempt("change a mount", "mount_setattr", lambda w: sc("mount_setattr", -100, b"/mnt", 0, struct.pack("4Q", 0x2, 0, 0, 0), 32)),
        Attempt("change quotas", "quotactl", lambda w: reaches(lambda: sc("quotactl", 0x80000200, b"/dev/null", 0, None), errno.ENOTBLK)),
        Attempt("switch accounting", "acct", lambda w: sc("acct", None)),
        Attempt("swap", "swapon", lambda w: reaches(lambda: sc("swapon", b"/mnt/none", 0), errno.ENOENT)),
        Attempt("end swapping", "swapoff", lambda w: reaches(lambda: sc("swapoff", b"/mnt/none"), errno.ENOENT, errno.EINVAL)),
    ],
    "sockets": [
        *(
            Attempt(f"a socket of family {family}", "socket", lambda w, number=number, kind=kind: socket.socket(number, kind).close(), accepted)
            for family, number, kind, accepted in (
                ("UNIX", 1, 1, _NSS),
                ("INET", 2, 1, _NETWORK),
                ("INET6", 10, 1, _NETWORK),
                ("NETLINK", 16, 3, _NETWORK),
                ("PACKET", 17, 3, {}),
                ("CAN", 29, 3, {}),
                ("BLUETOOTH", 31, 3, {}),
                ("ALG", 38, 5, {}),
                ("VSOCK", 40, 1, _HARMLESS),
                ("XDP", 44, 3, {}),
            )
        ),
        Attempt("a pair of sockets", "socketpair", lambda w: [one.close() for one in socket.socketpair()], {"namespaces": "a link to each child", **_COLLECTS, **_HARMLESS}),
        Attempt("connect a Unix socket", "connect", lambda w: w.unix.connect(f"{w.folder}/listening"), _NSS),
        Attempt("connect an abstract Unix socket", "connect", lambda w: w.unix.connect("\0fdbroker-tried")),
        Attempt("connect by TCP", "connect", lambda w: reaches(lambda: w.inet.connect(("127.0.0.1", 9)), errno.ECONNREFUSED) ),
        Attempt("connect by TCP with its first data", "sendto", fast_open, _NSS),
        Attempt("connect by TCP with its first data, by sendmsg", "sendmsg", lambda w: reaches(lambda: w.inet.sendmsg([b"x"], [], 0x20000000, ("127.0.0.1", 9)), errno.ECONNREFUSED), _NSS),
        Attempt("bind a TCP port", "bind", lambda w: w.inet.bind(("127.0.0.1", 0)), {"namespaces": "a rule for sockets may say `bind`"}),
        Attempt("bind a Unix socket", "bind", lambda w: w.unix.bind(f"\0fdbroker-{os.getpid()}"), {"namespaces": "a rule for sockets may say `bind`", **_NSS}),
        Attempt("listen", "listen", lambda w: w.inet.listen(), _NSS),
        Attempt("send to a Unix datagram socket", "sendto", lambda w: w.datagram.sendto(b"x", f"{w.folder}/datagrams"), _DATAGRAM),
    ],
    "its own rights": [
        Attempt("regain a capability", "capset", regained),
        Attempt("leave a capability to a program", "capset", lambda w: regained(w, inheritable=True)),
        Attempt("an ambient capability", "prctl", ambient),
        Attempt("become root", "setuid", lambda w: os.setuid(0)),
        Attempt("become another user", "setuid", lambda w: os.setuid(ANOTHER)),
        Attempt("become another user in all respects", "setresuid", lambda w: os.setresuid(ANOTHER, ANOTHER, ANOTHER)),
        Attempt("become another user for files", "setfsuid", lambda w: must(sc("setfsuid", ANOTHER) >= 0 and sc("setfsuid", ANOTHER) == ANOTHER)),
        Attempt("become another group", "setgid", lambda w: os.setgid(ANOTHER)),
        Attempt("have other groups", "setgroups", lambda w: os.setgroups([ANOTHER])),
        Attempt("be dumpable", "prctl", lambda w: prctl(4, 1, 0, 0, 0), _HARMLESS),
        Attempt("keep capabilities", "prctl", lambda w: prctl(8, 1, 0, 0, 0)),
        Attempt("no_new_privs off", "prctl", lambda w: no_new_privs_off()),
        Attempt("other securebits", "prctl", lambda w: prctl(28, 0, 0, 0, 0)),
        Attempt("outlive the service", "prctl", lambda w: prctl(1, 0, 0, 0, 0), {"namespaces": "its children are bound to it so; a worker ends with its links", **_HARMLESS}),
        Attempt("a seccomp filter of its own", "seccomp", lambda w: without_seccomp(), _HARMLESS),
        Attempt("more descriptors", "prlimit64", lambda w: own_limit(resource.RLIMIT_NOFILE, w.open_files + 1)),
        Attempt("core dumps", "prlimit64", lambda w: own_limit(resource.RLIMIT_CORE, 1), _HARMLESS),
        Attempt("run before all others", "sched_setscheduler", lambda w: sc("sched_setscheduler", 0, 1, struct.pack("i", 1))),
        Attempt("another personality", "personality", lambda w: sc("personality", 0x0040000), _HARMLESS),
    ],
    "the kernel": [
        Attempt("BPF", "bpf", lambda w: os.close(sc("bpf", 0, struct.pack("IIIII60x", 1, 4, 4, 1, 0), 80))),
        Attempt("io_uring", "io_uring_setup", lambda w: os.close(sc("io_uring_setup", 1, ctypes.create_string_buffer(120)))),
        Attempt("userfaultfd", "userfaultfd", lambda w: os.close(sc("userfaultfd", 0))),
        Attempt("add a key", "add_key", lambda w: sc("add_key", b"user", b"fdbroker-tried", b"x", 1, -2)),
        Attempt("ask for a key", "request_key", lambda w: reaches(lambda: sc("request_key", b"user", b"fdbroker-none", None, 0), errno.ENOKEY)),
        Attempt("look at keys", "keyctl", lambda w: sc("keyctl", 0, -2, 1)),
        Attempt("load a module", "init_module", lambda w: reaches(lambda: sc("init_module", b"x", 1, b""), errno.ENOEXEC) ),
        Attempt("load a module from a file", "finit_module", lambda w: reaches(lambda: sc("finit_module", w.executable, b"", 0), errno.ENOEXEC)),
        Attempt("unload a module", "delete_module", lambda w: reaches(lambda: sc("delete_module", b"fdbroker_none", 0), errno.ENOENT)),
        Attempt("load another kernel", "kexec_load", lambda w: reaches(lambda: sc("kexec_load", 0, 17, None, 0), errno.EINVAL)),
        Attempt("load another kernel from a file", "kexec_file_load", lambda w: reaches(lambda: sc("kexec_file_load", -1, -1, 0, b"", 0), errno.EBADF)),
        Attempt("reboot", "reboot", lambda w: reaches(lambda: sc("reboot", 0, 0, 0, None), errno.EINVAL)),
        Attempt("set the clock", "clock_settime", lambda w: set_clock()),
        Attempt("set the time zone", "settimeofday", lambda w: sc("settimeofday", None, struct.pack("ii", 0, 0))),
        Attempt("adjust the clock", "adjtimex", lambda w: reaches(lambda: sc("adjtimex", struct.pack("I204x", 0x4000)), errno.EINVAL)),
        Attempt("name the host", "sethostname", lambda w: sc("sethostname", w.host, len(w.host))),
        Attempt("name the domain", "setdomainname", lambda w: sc("setdomainname", b"(none)", 6)),
        Attempt("the ports of devices", "ioperm", lambda w: sc("ioperm", 0x80, 1, 1)),
        Attempt("all ports of devices", "iopl", lambda w: sc("iopl", 3)),
        Attempt("its own segment table", "modify_ldt", lambda w: sc("modify_ldt", 0, _BUFFER, 16)),
        Attempt("read the kernel's log", "syslog", lambda w: sc("syslog", 3, _BUFFER, 4096)),
        Attempt("hang up the terminal", "vhangup", lambda w: sc("vhangup")),
        Attempt("type on a terminal", "ioctl", lambda w: fcntl.ioctl(w.terminal, termios.TIOCSTI, b"x")),
        Attempt("ask a terminal", "ioctl", lambda w: fcntl.ioctl(w.terminal, termios.TIOCGWINSZ, bytes(8)), _HARMLESS),
        Attempt("shared memory", "shmget", lambda w: shared(lambda: sc("shmget", 0, 4096, 0o1600), lambda number: sc("shmctl", number, 0, None)), _HARMLESS),
        Attempt("semaphores", "semget", lambda w: shared(lambda: sc("semget", 0, 1, 0o1600), lambda number: sc("semctl", number, 0, 0)), _HARMLESS),
        Attempt("message queues", "msgget", lambda w: shared(lambda: sc("msgget", 0, 0o1600), lambda number: sc("msgctl", number, 0, None)), _HARMLESS),
        Attempt("POSIX message queues", "mq_open", lambda w: shared(lambda: sc("mq_open", _queue(), 0o102, 0o600, None), lambda number: sc("mq_unlink", _queue()))),
    ],
}
# fmt: on
ATTEMPTS = {attempt.name: attempt for attempts in TABLE.values() for attempt in attempts}
