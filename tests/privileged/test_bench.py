"""`scripts/bench` measures and compares; no number is judged here, for machines differ."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]


def test_the_quick_run_prints_every_ratio(root, tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, str(TOP / "scripts/bench"), "--quick", "--json", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(out.read_text())
    text = json.dumps(report)
    for word in ("one open", "16", "PING", "connect", "idle"):
        assert word.lower() in text.lower(), report.keys()
