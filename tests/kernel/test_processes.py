"""Whether a process whose main thread has ended is told from one that runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from fdbroker.kernel.processes import main_thread_ended

CODE = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print(flush=True)
input()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_without_its_main_thread_has_ended():
    command = [sys.executable, "-I", "-c", CODE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            process.stdout.readline()
            assert not main_thread_ended(process.pid)
            process.stdin.write("\n")
            process.stdin.flush()
            end = time.monotonic() + 10
            while not main_thread_ended(process.pid):
                assert time.monotonic() < end
                time.sleep(0.01)
            assert process.poll() is None  # and nobody can wait for it
        finally:
            process.kill()
    assert not main_thread_ended(process.pid)
    assert not main_thread_ended(os.getpid())
