"""`scripts/soak` for a short time, or for two minutes where CI=true: honest and hostile load, and nothing left of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

TOP = Path(__file__).resolve().parents[2]
SECONDS = 120 if os.environ.get("CI") == "true" else 15


def test_after_the_load_everything_is_what_it_was(root, tmp_path):
    """No honest request failed, all grants are recorded, no message lost, no descriptor, thread or memory kept."""
    command = [sys.executable, str(TOP / "scripts/soak"), "--seconds", str(SECONDS), "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 240)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["wrong"] == []
    assert len(found["samples"]) > SECONDS / 5
    assert all(one["count"]["done"] > 0 for one in found["honest"].values())
    assert all(found["hostile_rounds"].values()), found["hostile_rounds"]
    assert ET.fromstring((tmp_path / "soak.svg").read_text()).tag.endswith("svg")
