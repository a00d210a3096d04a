"""What starts before anything is confined."""

from __future__ import annotations

import subprocess
import sys

# as sys.addaudithook(3) names what starts a program
CODE = """
import sys
started = []
sys.addaudithook(lambda name, found: name in EVENTS and started.append((name, str(found))))
sys.path[:0] = PATH
import ctypes.util
before = ctypes.util.find_library
import fdbroker.launcher.service
assert ctypes.util.find_library is before
import fdbroker.launcher.filters as filters
import os
os.close(filters.compile_filter("opener"))
print(started)
"""


def test_no_program_is_run_to_find_a_library():
    """By itself pyseccomp would run ldconfig, as root, and the compiler where there is one."""
    events = "('subprocess.Popen', 'os.posix_spawn', 'os.exec', 'os.system', 'os.fork')"
    code = CODE.replace("EVENTS", events).replace("PATH", repr(sys.path))
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    without = code.replace("import fdbroker.launcher.service", "import pyseccomp; import fdbroker.launcher.service")
    done = subprocess.run([sys.executable, "-I", "-S", "-c", without], capture_output=True, text=True, check=True)
    assert "ldconfig" in done.stdout  # what this test would see
