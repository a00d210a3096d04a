"""What one owner's records of a day take of the journal: measured with a real one, as docs/operating.md says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from harness import cannot

from fdbroker.limits import every as limits

TOP = Path(__file__).parents[2]
DEFAULTS = {"records_per_second": 50, "record_burst": 2000, "unread_grants": 64}


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
def test_the_defaults_are_those_of_the_design(name, default):
    assert limits.USER_LIMITS[name].default == default


def test_a_day_fits_into_what_the_journal_keeps():
    """The script fails above 4 GiB; the document has its figures, but for what the journal rounds."""
    if os.getuid() != 0:
        cannot("only root boots a machine")
    done = subprocess.run([TOP / "scripts/journal"], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (TOP / "docs/operating.md").read_text()
    sums = [float(found) for found in re.findall(r"([\d.]+) GiB$", done.stdout, re.MULTILINE)]
    assert len(sums) == 6, done.stdout
    said = [float(found) for found in re.findall(r"\| \**([\d.]+) GiB\**", text)]
    assert said == pytest.approx(sums, abs=0.03)
    most = DEFAULTS["records_per_second"] * 86_400 + DEFAULTS["record_burst"]
    assert f"{most:,}" in done.stdout
    assert f"{most:,}" in text
