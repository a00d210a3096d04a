"""T3: an error, its timing, or a system call tells whether a path outside the policy exists."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time

import harness
from harness import MEM, Raw, node, running

POLICY = "version: 1\neveryone: {devices: [{path: /dev/null}]}\n"
OUTSIDE = ["/dev/there", "/dev/not-there", "/dev/folder", "/dev/folder/none", "/etc/shadow", "/etc/none", "/root/x"]


def test_the_answers_are_the_same_byte_for_byte(dev):
    node("/dev/there", MEM["zero"])
    os.mkdir("/dev/folder")
    with running(POLICY) as broker, Raw(broker.socket) as client:
        answers = {str(client.open(path)).replace(path, "PATH") for path in OUTSIDE}
    assert len(answers) == 1
    assert "Denied" in answers.pop()


def test_no_system_call_is_made_on_such_a_path(dev):
    node("/dev/there", MEM["zero"])
    with contextlib.suppress(FileNotFoundError):
        subprocess.run(["strace", "-V"], capture_output=True, check=True)
        with running(POLICY) as broker:
            trace = broker.folder / "trace"
            tracer = subprocess.Popen(
                [
                    "strace",
                    "-f",
                    "-s",
                    "200",
                    "-o",
                    str(trace),
                    "-p",
                    str(broker.pids["opener"]),
                    "-p",
                    str(broker.pids["inbox"]),
                ],
                stderr=subprocess.PIPE,
            )
            assert b"attached" in tracer.stderr.readline()
            with Raw(broker.socket) as client:
                assert client.open("/dev/null")["parameters"]["grants"]
                for path in OUTSIDE:
                    client.open(path)
            time.sleep(0.2)
            tracer.terminate()
            tracer.communicate()
            lines = trace.read_text().splitlines()
        assert any("openat2(" in line and '"null"' in line for line in lines), "the trace shows nothing"
        touching = [line for line in lines if not any(call in line for call in ("recv", "send", "write("))]
        for path in OUTSIDE:
            name = path.removeprefix("/dev/")
            assert not [line for line in touching if f'"{name}"' in line or f'"{path}"' in line]
        return
    harness.cannot("needs strace")
