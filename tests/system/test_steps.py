"""What the tests in the machines rest on: they end soon, with the service's own words, when the service does not run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

# the installed unit, with a program that cannot run
BREAK = r"""
scripts/install
mkdir -p /etc/systemd/system/fdbroker.service.d
printf '[Service]\nExecStart=\nExecStart=/bin/sh -c "echo the reason for the test >&2; exit 1"\n' \
    >/etc/systemd/system/fdbroker.service.d/broken.conf
systemctl daemon-reload
exec /opt/fdbroker/bin/python3 -B tests/system/inside/faults.py
"""


def test_a_service_that_has_failed_is_not_waited_for(boot: Callable[..., Any]):
    """The first step that waits for it says what the journal has, and the steps behind that one are left out."""
    began_s = time.monotonic()
    found = boot("nspawn", BREAK, 300)
    assert time.monotonic() - began_s < 100  # of which its twenty starts take about 15
    for step, said in (
        ("started", "(?s)fdbroker.service has failed; its journal ends with:.*the reason for the test"),
        ("healthy", "never got to healthy"),
    ):
        with pytest.raises(pytest.fail.Exception, match=said):
            found[step]
