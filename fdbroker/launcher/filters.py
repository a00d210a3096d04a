"""The seccomp filters, compiled here, so that the children only load the bytes.

Runs in: launcher. What no healthy process of ours does kills it; what else is not on its list fails with EPERM, for
another version of Python or of the C library may try it and go on. The launcher itself has no list of what it may do,
for nobody knows what a machine's NSS modules do, but one of what it may not.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import socket
import termios
from typing import NamedTuple

from fdbroker.kernel.namespaces import CLONE, KCMP_FILES, PIDFD_GET_INFO, QUESTIONS
from fdbroker.kernel.received import SO_PASSRIGHTS
from fdbroker.kernel.seccomp import pyseccomp
from fdbroker.terms import NEW_NAMESPACE_TYPES

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What Python and the C library do in any process.
_RUNTIME = """
    brk munmap mremap madvise futex rt_sigreturn rt_sigaction rt_sigprocmask sigaltstack exit exit_group
    restart_syscall clock_gettime clock_nanosleep gettimeofday getpid gettid getuid geteuid getgid getegid getrandom
    read write close fcntl fstat newfstatat lseek poll ppoll sched_yield
"""
_LOOP = """
    epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 recvmsg recvfrom getsockopt getsockname
"""
_OPENER = """
    accept4 openat2 openat readlinkat capset pread64 dup prlimit64 eventfd2 set_robust_list rseq pidfd_open shutdown
"""

# The keeper lists folders and finds nodes; Landlock lets it read no file. Flags of openat2 no filter sees.
_KEEPER = """
    openat2 readlinkat getdents64 inotify_init1 inotify_add_watch pread64
"""

# What the inbox does beside: read a payload from its memfd, whatever becomes of the message; start a thread to close
# what came with a message; see how many of these it may hold.
_INBOX = """
    pread64 set_robust_list rseq prlimit64 shutdown
"""
# What the store alone does (inbox/store.py and inbox/reserve.py), by itself and by SQLite: Landlock says in which
# folder. An inbox without a store touches no file, so it may do none of this. A call that any other module of the inbox
# makes belongs above: tests/privileged/test_each_feature_alone.py.
_STORE = """
    openat pwrite64 fsync fdatasync ftruncate fallocate unlink access rename
"""

# A process of ours that does one of these is not itself any more.
_DEADLY = """
    execve execveat ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd bpf perf_event_open keyctl add_key
    request_key mount umount2 pivot_root chroot move_mount fsopen fsmount open_tree mount_setattr unshare setns
    init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff io_uring_setup
    io_uring_enter io_uring_register userfaultfd open_by_handle_at setuid setgid setreuid setregid setresuid
    setresgid setgroups setfsuid setfsgid fork vfork socket bind connect listen memfd_secret quotactl acct
    settimeofday clock_settime sethostname setdomainname iopl ioperm modify_ldt
"""

# The namespaces worker and its children.
_WORKER = """
    readlink readlinkat getdents64 capset pread64 dup pidfd_open kill wait4 getppid setpgid bind setsockopt
    set_robust_list rseq
"""

PROCESSES = {
    "opener": _RUNTIME + _LOOP + _OPENER,
    "keeper": _RUNTIME + _LOOP + _KEEPER,
    "inbox": _RUNTIME + _LOOP + _INBOX,
    "inbox-store": _RUNTIME + _LOOP + _INBOX + _STORE,
    "namespaces": _RUNTIME + _LOOP + _WORKER,
    "witness": _RUNTIME + "recvmsg select pselect6 getsockname getsockopt capset",
    "refuser": _RUNTIME + "accept4 recvfrom shutdown getsockname getsockopt setsockopt set_robust_list rseq",
}


class Ioctl(NamedTuple):
    """One ioctl(2) that a process may make: its request, the module that makes it, the rules that need it."""

    process: str
    name: str
    request: int
    module: str
    rules: str


# All ioctls of our processes; tests/launcher/test_ioctls.py compares them with the filters and with the code.
IOCTLS = (
    # how much has the client not read yet; of SIOCOUTQ's number termios has the other name
    Ioctl("opener", "SIOCOUTQ", termios.TIOCOUTQ, "kernel/sockets.py", "all"),
    # the same of a subscriber that descriptors were sent to
    Ioctl("inbox", "SIOCOUTQ", termios.TIOCOUTQ, "kernel/sockets.py", "`topics`"),
    # whether a socket that is to be closed has something unread in it, which may take its time to close
    Ioctl("opener", "SIOCINQ", termios.FIONREAD, "kernel/sockets.py", "all"),
    Ioctl("inbox", "SIOCINQ", termios.FIONREAD, "kernel/sockets.py", "all"),
    # which type, whose, and which process: answer.py; the witness compares two by their numbers alone
    Ioctl("namespaces", "NS_GET_NSTYPE", QUESTIONS["NS_GET_NSTYPE"], "kernel/namespaces.py", "`namespaces`, `sockets`"),
    Ioctl("namespaces", "NS_GET_USERNS", QUESTIONS["NS_GET_USERNS"], "kernel/namespaces.py", "`namespaces`"),
    Ioctl("namespaces", "NS_GET_OWNER_UID", QUESTIONS["NS_GET_OWNER_UID"], "kernel/namespaces.py", "`namespaces`"),
    Ioctl(
        "namespaces",
        "NS_GET_PID_FROM_PIDNS",
        QUESTIONS["NS_GET_PID_FROM_PIDNS"],
        "kernel/namespaces.py",
        "`namespaces` with `of`",
    ),
    # how many mounts a mount namespace has, and which is the next one: answer.py, living.py
    Ioctl(
        "namespaces",
        "NS_MNT_GET_INFO",
        QUESTIONS["NS_MNT_GET_INFO"],
        "kernel/namespaces.py",
        "`namespaces` with `create`",
    ),
    Ioctl(
        "namespaces",
        "NS_MNT_GET_NEXT",
        QUESTIONS["NS_MNT_GET_NEXT"],
        "kernel/namespaces.py",
        "`namespaces` with `create`",
    ),
    # the uids of all processes, without their groups: living.py
    Ioctl("namespaces", "PIDFD_GET_INFO", PIDFD_GET_INFO, "kernel/namespaces.py", "`namespaces` with `create`"),
)


def _ioctls(process: str) -> tuple[int, tuple[int, ...]]:
    return 1, tuple(row.request for row in IOCTLS if row.process == process)


# What is allowed with certain values of one argument only: which one, and which values.
_FORK = 0x0120_0000 | signal.SIGCHLD  # CLONE_CHILD_CLEARTID, CLONE_CHILD_SETTID: what glibc's fork says
_THREAD = 0x003D_0F00  # what glibc's pthread_create says: a thread that shares all there is, and no process
# a pair of sockets that is closed at once has the kernel collect others
_OF_INBOX: dict[str, tuple[int, tuple[int, ...]]] = {
    "ioctl": _ioctls("inbox"),
    "clone": (0, (_THREAD,)),
    "socketpair": (0, (socket.AF_UNIX,)),
    "setsockopt": (2, (SO_PASSRIGHTS,)),  # whether a client may send descriptors
}
NARROWED: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {
    # threads for drivers that sleep
    "opener": {
        "ioctl": _ioctls("opener"),
        "setsockopt": (2, (socket.SO_OOBINLINE, socket.SO_PASSCRED)),
        "clone": (0, (_THREAD,)),
    },
    "keeper": {},
    "inbox": _OF_INBOX,
    "inbox-store": _OF_INBOX,
    "namespaces": {
        "setns": (1, tuple(CLONE[kind] for kind in ("net", "mnt", "user"))),
        "unshare": (0, tuple(CLONE[kind] for kind in NEW_NAMESPACE_TYPES)),
        "clone": (0, (_FORK,)),
        "socketpair": (0, (socket.AF_UNIX,)),
        "socket": (0, (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)),
        "ioctl": _ioctls("namespaces"),
        "prctl": (0, (_PR_SET_PDEATHSIG,)),
        "kcmp": (2, (KCMP_FILES,)),  # whose threads have one table of descriptors: living.py
    },
    "witness": {},
    "refuser": {"clone": (0, (_THREAD,)), "setsockopt": (2, (socket.SO_OOBINLINE,))},
}
# What is allowed with certain flags only: in which argument, which flags are looked at, and which of these must be set.
# No process makes code once it is confined, and none connects: what is sent with the first packet of a TCP connection
# would.
_MSG_FASTOPEN = 0x2000_0000  # linux/socket.h
_WITHOUT = {
    "mmap": (2, mmap.PROT_EXEC, 0),
    "mprotect": (2, mmap.PROT_EXEC, 0),
    "sendto": (3, _MSG_FASTOPEN, 0),
    "sendmsg": (2, _MSG_FASTOPEN, 0),
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_READING = {"openat": (2, _WRITING, 0)}
WITHOUT: dict[str, dict[str, tuple[int, int, int]]] = {
    "opener": _WITHOUT,
    # it opens folders alone, and sends no descriptor
    "keeper": {
        **{name: flags for name, flags in _WITHOUT.items() if name != "sendmsg"},
        "openat": (2, _WRITING | os.O_DIRECTORY, os.O_DIRECTORY),
    },
    "inbox": _WITHOUT,
    "inbox-store": _WITHOUT,
    # it has no Landlock, and reads only; so not openat2 either, whose flags no filter sees
    "namespaces": {**_WITHOUT, **_READING},
    "witness": {**_WITHOUT, **_READING},
    "refuser": _WITHOUT,
}
# NSS may ask a server.
_LAUNCHER_MAY = "socket bind connect listen"
# What the kernel lets the launcher do to every process of root's uid, process 1 among them, without a capability. Its
# children end by their links or by lifeline.py, never by a signal of the launcher's.
_LAUNCHER_MAY_NOT = """
    kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal setpriority ioprio_set sched_setscheduler
    sched_setparam sched_setattr sched_setaffinity
"""


def compile_launchers() -> bytes:
    """The launcher's own filter, for when all serve. Raises OSError when libseccomp refuses."""
    program = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    refused = pyseccomp.ERRNO(errno.EPERM)
    for name in set(_DEADLY.split()).difference(_LAUNCHER_MAY.split()).union(_LAUNCHER_MAY_NOT.split()):
        _add(program, refused, name)
    _add(program, refused, "prlimit64", pyseccomp.Arg(0, pyseccomp.NE, 0))  # 0 is the launcher itself
    for flag in CLONE.values():
        _add(program, refused, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flag, flag))
    _add(program, pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    with os.fdopen(_exported(program, "launcher"), "rb") as file:
        return file.read()


def compile_filter(process: str) -> int:
    """A child's seccomp filter as an owned memfd at its beginning. Raises OSError when libseccomp refuses."""
    program = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    allowed, narrowed, without = PROCESSES[process].split(), NARROWED[process], WITHOUT[process]
    for name in allowed:
        _add(program, pyseccomp.ALLOW, name)
    for name, (position, values) in narrowed.items():
        for value in values:
            _add(program, pyseccomp.ALLOW, name, pyseccomp.Arg(position, pyseccomp.EQ, value))
    for name, (position, flags, wanted) in without.items():
        _add(program, pyseccomp.ALLOW, name, pyseccomp.Arg(position, pyseccomp.MASKED_EQ, flags, wanted))
    for name in set(_DEADLY.split()).difference(allowed, narrowed):
        _add(program, pyseccomp.KILL_PROCESS, name)
    # glibc then falls back to clone, which is not on the list
    _add(program, pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    return _exported(program, process)


def _exported(program: pyseccomp.SyscallFilter, process: str) -> int:
    descriptor = os.memfd_create(f"seccomp-{process}")
    with open(descriptor, "r+b", closefd=False) as file:
        program.export_bpf(file)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _add(program: pyseccomp.SyscallFilter, action: int, name: str, *arguments: pyseccomp.Arg) -> None:
    try:
        program.add_rule(action, name, *arguments)
    except (OSError, ValueError) as error:
        # unknown to this libseccomp or this architecture: it stays with EPERM, like everything not on the list
        if getattr(error, "errno", errno.EINVAL) not in (errno.EFAULT, errno.EINVAL, errno.EDOM):
            raise
