"""All of them under one name, for tests and documents. Runs in: no process."""

# ruff: noqa: F403 -- to name each a second time here would be a second place for a limit
from __future__ import annotations

from fdbroker.limits.bridges import *
from fdbroker.limits.client import *
from fdbroker.limits.inbox import *
from fdbroker.limits.keeper import *
from fdbroker.limits.launcher import *
from fdbroker.limits.namespaces import *
from fdbroker.limits.opener import *
from fdbroker.limits.policy import *
