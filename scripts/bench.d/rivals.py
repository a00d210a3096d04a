"""What fdbroker is compared with, where it is installed: seatd, and a D-Bus service behind dbus-daemon or dbus-broker.

Each runs in a folder of the benchmark's, seatd and dbus-broker in a mount namespace of their own as well: nothing of
this machine's seat or buses is touched. Programs are looked for in PATH, then where scripts/test unpacks them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from processes import Failed, running, tail

_ROOT = Path(__file__).resolve().parents[2]
_UNPACKED = _ROOT / ".venv/bench/usr"
PYTHON = str(_ROOT / ".venv/bin/python")
_SERVICE = str(Path(__file__).resolve().parent / "dbus_service.py")
_WAIT_S = 20.0

_BUS = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*" eavesdrop="false"/>
    <allow receive_sender="*"/>
  </policy>
</busconfig>
"""

# seatd opens what has the name of an input device, below /dev, and its socket is always /run/seatd.sock
_SEATD = """
mount --bind /dev/null "$1/dev/null" && mount --bind /dev/null "$1/dev/input/event0" &&
mount --rbind "$1/dev" /dev && mount --bind "$1/run" /run && exec "$2" -l silent
"""

# dbus-broker-launch wants a journal and the bus itself by its usual name, starts /usr/bin/dbus-broker, and takes the
# listening socket from the service manager
_DBUS_BROKER = """
mount --bind "$1/run" /run || exit
[ -x /usr/bin/dbus-broker ] || mount -t overlay overlay -o "lowerdir=$2:/usr/bin" /usr/bin || exit
LISTEN_FDS=1 LISTEN_PID=$$ exec "$2/dbus-broker-launch" --scope user --config-file "$1/bus.conf" 3<&0
"""


def find(name: str) -> str | None:
    """The path of an installed or unpacked program."""
    places = [os.environ.get("PATH", os.defpath), "/usr/sbin", str(_UNPACKED / "bin"), str(_UNPACKED / "sbin")]
    return shutil.which(name, path=os.pathsep.join(places))


def _own_mounts(script: str, *words: str) -> list[str]:
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *words]


def _log(folder: Path, name: str) -> IO[bytes]:
    return (folder / f"{name}.log").open("ab")


def _folder(under: Path, name: str) -> Path:
    folder = under / name
    folder.mkdir(mode=0o755)
    (folder / "run").mkdir()
    return folder


@contextlib.contextmanager
def seatd(program: str, under: Path, cpus: Sequence[int]) -> Iterator[Path]:
    """Run seatd with one device, a /dev/null; yield its socket."""
    folder = _folder(under, "seatd")
    (folder / "dev/input").mkdir(parents=True)
    for name in ("null", "input/event0"):
        (folder / "dev" / name).touch()
    address = folder / "run/seatd.sock"
    command = _own_mounts(_SEATD, str(folder), program)
    with (
        _log(under, "seatd") as log,
        running(command, cpus, log, env={"SEATD_VTBOUND": "0", "PATH": os.defpath}) as process,
    ):
        deadline_s = time.monotonic() + _WAIT_S
        while not address.exists():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise Failed(f"seatd does not listen: {tail(Path(log.name))}")
            time.sleep(0.01)
        address.chmod(0o666)
        yield address


@contextlib.contextmanager
def dbus_daemon(program: str, under: Path, cpus: Sequence[int]) -> Iterator[Path]:
    """Run a dbus-daemon of our own with the service; yield its socket."""
    folder = _folder(under, "dbus-daemon")
    address = folder / "bus"
    (folder / "bus.conf").write_text(_BUS.format(socket=address))
    command = [program, "--nofork", "--nopidfile", f"--config-file={folder / 'bus.conf'}"]
    with _log(under, "dbus-daemon") as log, running(command, cpus, log), _service(address, under, cpus):
        yield address


@contextlib.contextmanager
def dbus_broker(program: str, under: Path, cpus: Sequence[int]) -> Iterator[Path]:
    """Run a dbus-broker of our own with the service; yield its socket."""
    folder = _folder(under, "dbus-broker")
    address = folder / "bus"
    (folder / "bus.conf").write_text(_BUS.format(socket=address))
    (folder / "run/systemd/journal").mkdir(parents=True)
    command = _own_mounts(_DBUS_BROKER, str(folder), str(Path(program).parent))
    environment = {"DBUS_SESSION_BUS_ADDRESS": f"unix:path={address}", "PATH": os.defpath}
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal,
        socket.socket(socket.AF_UNIX) as listener,
        _log(under, "dbus-broker") as log,
    ):
        journal.bind(str(folder / "run/systemd/journal/socket"))  # what comes there is not read
        listener.bind(str(address))
        listener.listen()
        address.chmod(0o666)
        with (
            running(command, cpus, log, env=environment, stdin=listener.fileno()),
            _service(address, under, cpus),
        ):
            yield address


@contextlib.contextmanager
def _service(address: Path, under: Path, cpus: Sequence[int]) -> Iterator[None]:
    with (
        _log(under, "dbus-service") as log,
        running([PYTHON, "-I", _SERVICE, str(address)], cpus, log, output=True) as process,
    ):
        if process.stdout is None or process.stdout.readline() != b"ready\n":
            raise Failed(f"no service on the bus {address}: {tail(Path(log.name))}")
        yield


# by the name that the program has in the results
BUSES = {"dbus-daemon": ("dbus-daemon", dbus_daemon), "dbus-broker": ("dbus-broker-launch", dbus_broker)}
