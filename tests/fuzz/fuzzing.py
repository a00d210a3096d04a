"""What all fuzz targets share: their list, how bytes are cut, what a run costs, and the fuzzer around one of them.

A target is a module beside this one with `target(data)`, which raises when an invariant does not hold, `seeds()`, made
of real messages, and `WORDS`, what mutations should know of. Its corpus is the folder of its name in `corpus`.

As a program, the engine that scripts/fuzz and the tests start: fuzzing.py [--package FOLDER] TARGET [FOLDER…] [-OPTION…]
with libFuzzer's options. The package under test is then instrumented, and may be another copy in FOLDER.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
CORPUS = HERE / "corpus"
TARGETS = (
    "frame",
    "varlink",
    "decode",
    "link",
    "resources",
    "policy",
    "compiled",
    "paths",
    "store",
    "notifications",
    "signals",
    "events",
)
KEPT = 48  # inputs in the corpus of a target, beside those that broke it once
MAX_BYTES = 4096  # of an input: small ones are quick, and every limit that is larger is lowered by its target
# Lines of the package, and of PyYAML, that a target may run for an input: so many, and so many for each byte. The
# dearest today takes a fifth of it; whatever is quadratic in 4096 bytes takes far more.
WORK, WORK_PER_BYTE = 50_000, 2_000


def load(name: str) -> ModuleType:
    """The module of a target."""
    return importlib.import_module(f"fuzz.{name}")


def inputs(name: str) -> Iterator[tuple[str, bytes]]:
    """The seeds and the kept corpus of a target, each with a name for the report."""
    for number, seed in enumerate(load(name).seeds()):
        yield f"seed {number}", seed
    for path in sorted((CORPUS / name).glob("*")):
        yield path.name, path.read_bytes()


def name_of(data: bytes) -> str:
    """The file name of an input in a corpus."""
    return hashlib.sha256(data).hexdigest()[:16]


def cuts(data: bytes) -> Iterator[list[bytes]]:
    """The same bytes as a socket could bring them: all at once, one by one, and in pieces of any size."""
    yield [data] if data else []
    yield [data[at : at + 1] for at in range(len(data))]
    sizes, pieces, at = random.Random(zlib.crc32(data)), [], 0
    while at < len(data):
        end = at + sizes.randint(1, 40)
        pieces.append(data[at:end])
        at = end
    yield pieces


class Trace:
    """Runs a target and notes what of the package it went through: how many lines, and from which to which, how often."""

    def __init__(self) -> None:
        self.lines = 0
        self._arcs: Counter[tuple[str, int, int]] = Counter()
        packages = (importlib.import_module(name) for name in ("fdbroker", "yaml"))
        self._folders = tuple(os.path.dirname(str(package.__file__)) + os.sep for package in packages)

    def run(self, module: ModuleType, data: bytes) -> None:
        """Whatever the target raises is raised."""
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            module.target(data)
        finally:
            sys.settrace(before)

    @property
    def features(self) -> set[tuple[str, int, int, int]]:
        """What makes an input another one: each step, and roughly how often it was made."""
        return {(*arc, count.bit_length()) for arc, count in self._arcs.items()}

    def _called(self, frame: FrameType, event: str, _: Any) -> Any:
        file, last = frame.f_code.co_filename, frame.f_code.co_firstlineno
        if not file.startswith(self._folders):
            return None

        def line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            if event == "line":
                self.lines += 1
                self._arcs[file, last, frame.f_lineno] += 1
                last = frame.f_lineno
            return line

        return line


def _dictionary(words: tuple[bytes, ...]) -> str:
    """LibFuzzer's format. Source: llvm.org, "LibFuzzer", Dictionaries."""
    return "".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in words)


def main(arguments: list[str]) -> None:
    """Fuzz one target until an option of libFuzzer ends it; a broken invariant is its exit code 77."""
    package = TOP
    if arguments[0] == "--package":
        package, arguments = Path(arguments[1]), arguments[2:]
    sys.path[:0] = [str(package), str(HERE.parent)]
    import atheris

    name, *options = arguments
    with atheris.instrument_imports(include=["fdbroker", "yaml", f"fuzz.{name}"]):
        module = load(name)
    with tempfile.NamedTemporaryFile("w", suffix=".dict") as words:
        words.write(_dictionary(module.WORDS))
        words.flush()
        if module.WORDS:
            options.append(f"-dict={words.name}")
        options = [f"-max_len={MAX_BYTES}", "-timeout=60", "-rss_limit_mb=2048", *options]
        atheris.Setup([name, *options], module.target)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
