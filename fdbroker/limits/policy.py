"""The maxima of a policy, and what each user's may be: its `limits:`.

Runs in: launcher, command line.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from fdbroker.limits.opener import LIVING_NAMESPACES

# --- messages
# topics | guess; a connection's rights are a bit for each | load fails
# shown by test_maxima.py::test_topics_of_a_policy_and_of_a_subscription
TOPICS: Final = 256
# bytes | guess: a name that people read | load fails
# shown by test_maxima.py::test_the_name_of_a_topic
TOPIC_BYTES: Final = 64
# bytes | design: a payload in a memfd, where a topic says nothing | EMSGSIZE
# shown by test_maxima.py::test_a_payload_in_a_memfd
ATTACHED_BYTES: Final = 67_108_864
# bytes | as HELD_BYTES | load fails
# shown by test_maxima.py::test_what_a_policy_may_say_of_payloads
ATTACHED_BYTES_MAX: Final = 268_435_456
# users | guess: each broadcast that is stored has a row for each | load fails
# shown by test_maxima.py::test_users_that_may_subscribe
USERS: Final = 4096
# seconds | design: 7d, where a topic says nothing | the message is removed
# shown by test_maxima.py::test_a_message_is_kept_for_so_long_where_a_topic_says_nothing
KEEP_SECONDS: Final = 604_800

# --- the policy
# bytes | guess: a large policy is 20 KiB; the parser is slow | load fails
# shown by test_maxima.py::test_bytes_of_a_policy_file
POLICY_FILE_BYTES: Final = 262_144
# bytes | measured: of all files, loading takes 10 s | load fails
# shown by test_maxima.py::test_bytes_of_all_files_of_a_policy
POLICY_BYTES: Final = 1_048_576
# files | guess | load fails
# shown by test_maxima.py::test_files_of_a_policy
POLICY_FILES: Final = 256
# levels | the deepest valid policy has 6 | load fails
# shown by test_maxima.py::test_levels_of_a_policy
POLICY_DEPTH: Final = 16


class UserLimit(NamedTuple):
    """A per-user maximum that the policy's `limits:` may change, from `least` to `most`."""

    default: int
    least: int
    most: int
    meaning: str


USER_LIMITS: dict[str, UserLimit] = {
    "connections": UserLimit(64, 1, 20_000, "connections at the same time"),
    "requests_per_second": UserLimit(500, 1, 1_000_000, "requests a second, on average; each resource and node counts"),
    "burst": UserLimit(1000, 1, 1_000_000, "requests at once, before the average counts"),
    "unread_grants": UserLimit(64, 1, 1024, "descriptors sent and not yet read, those of the next request included"),
    "records_per_second": UserLimit(50, 1, 1_000_000, "records of grants and journaled messages a second, on average"),
    "record_burst": UserLimit(2000, 1, 1_000_000, "records at once, before the average counts"),
    "namespaces": UserLimit(16, 1, LIVING_NAMESPACES, "living namespaces that the broker made"),
    "subscriptions": UserLimit(16, 1, 1024, "connections that wait for messages"),
    "stored_messages": UserLimit(1000, 1, 1_000_000, "messages sent and stored until all who should have got them"),
    "stored_bytes": UserLimit(16_777_216, 1, 1_073_741_824, "bytes of these messages"),
    "leases": UserLimit(256, 1, 65_536, "descriptors that the broker still tracks (none in this version)"),
}
