"""The maxima of the client library.

Runs in: clients.
"""

from __future__ import annotations

from typing import Final

# --- what can sleep in the kernel
# threads | guess: of a client, for what senders sent along | wait
# shown by client/test_closing.py::test_no_more_threads_than_that_and_none_is_left
RECEIVED_THREADS: Final = 4
# threads | guess: likewise, a quarter for one sender; 13 in all | wait
# shown by client/test_closing.py::test_no_more_threads_than_that_and_none_is_left
RECEIVED_STUCK: Final = 8
