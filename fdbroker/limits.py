"""Every maximum of the broker: its name, unit, where the number comes from, what happens above it, and its value.

The value passes, value + 1 does not. Runs in: every process; imports nothing. docs/limits.md is printed from this file
(scripts/docs), a test compares; tests/test_limits.py names the test of each.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

# --- the wire
MESSAGE_BYTES: Annotated[int, "bytes", "design: one frame or one Varlink message", "EMSGSIZE or disconnect"] = 65_536
RESOURCES_PER_OPEN: Annotated[int, "resources", "design; far below SCM_MAX_FD (253)", "InvalidParameter"] = 64
REPLY_WITH_DESCRIPTORS_BYTES: Annotated[
    int, "bytes", "unix(7): one skb, so a stream socket takes it whole or not at all", "QuotaExceeded"
] = 32_768
PATH_BYTES: Annotated[int, "bytes", "PATH_MAX with its NUL is 4096 (linux/limits.h)", "Denied"] = 4095
NAME_BYTES: Annotated[int, "bytes", "NAME_MAX (linux/limits.h): one path component", "Denied"] = 255
LABEL_BYTES: Annotated[
    int, "bytes", "a page, as of /proc/PID/attr/current", "the label counts as unknown; in a policy: load fails"
] = 4096
MESSAGE_SECONDS: Annotated[int, "seconds", "design: a message must be complete", "disconnect"] = 10
ATTACHED_SECONDS: Annotated[
    int, "seconds", "design: since descriptors came with a part of it; all is gone 10 s after its client", "disconnect"
] = 6
ANSWER_SECONDS: Annotated[
    int, "seconds", "guess: a client takes something of an answer that it asked for", "disconnect"
] = 5
WAITING_BYTES: Annotated[int, "bytes", "guess: that wait in the inbox for all clients together", "disconnect"] = (
    134_217_728
)
WAITING_SHARE_BYTES: Annotated[int, "bytes", "guess: of these, the least that one owner may have", "disconnect"] = (
    1_048_576
)
UNSENT_BYTES: Annotated[int, "bytes", "guess: answers that wait for a client that does not read", "disconnect"] = (
    262_144
)
OFFERS: Annotated[int, "resources", "guess: a machine has some hundred nodes", "the list is cut"] = 4096

# --- the links between our processes
LINK_BYTES: Annotated[int, "bytes", "one request of 64 KiB and its lengths fit twice", "the service ends"] = 131_072
KEPT_VALUES: Annotated[int, "values", "guess: what programs ask for again and again", "all are forgotten"] = 256
KEPT_BYTES: Annotated[int, "bytes", "guess: sixteen resources with long paths", "not remembered"] = 2048
LINK_WAITING: Annotated[int, "messages", "guess: five for each of 20,000 connections", "the service ends"] = 131_072
POLICY_LINK_BYTES: Annotated[int, "bytes", "guess: a large policy, compiled, is 1 MiB", "load fails"] = 16_777_216

# --- the namespaces worker
NAMESPACE_SECONDS: Annotated[int, "seconds", "guess: a thousand times what it takes", "OpenFailed (ETIMEDOUT)"] = 5
MOUNTS: Annotated[
    int, "mounts", "measured: sixteen copies take 25 MiB of the kernel's memory", "OpenFailed (ENOSPC)"
] = 4096
LIVING_SECONDS: Annotated[
    int, "seconds", "guess: of looking what an owner's processes and root's hold", "all count as living"
] = 1
LIVING_OTHERS_MS: Annotated[
    int, "milliseconds", "measured: of looking at others' after that, 0.1 ms each", "the rest holds nothing"
] = 250
NAMESPACE_STOPPED_MS: Annotated[int, "milliseconds", "design: its caller has stopped the child", "OpenFailed"] = 500
NAMESPACE_REQUESTS: Annotated[int, "requests", "guess: each is a process for a moment; one of each user", "wait"] = 16
NAMESPACE_HELD: Annotated[int, "descriptors", "guess: one user's requests that wait for more", "RateLimited"] = 128
NAMESPACE_WAIT_SECONDS: Annotated[int, "seconds", "guess: twice what the worker gives a child", "OpenFailed"] = 10

# --- what can sleep in the kernel
OPENING_THREADS: Annotated[int, "threads", "guess: of different owners at the same time, in the opener", "wait"] = 16
CLOSING_THREADS: Annotated[int, "threads", "guess: of different owners, in opener and inbox each", "wait"] = 32
STUCK_SECONDS: Annotated[int, "seconds", "guess: of a job that a thread does", "another thread goes on"] = 1
STUCK_THREADS: Annotated[int, "threads", "guess: a quarter for one owner; TasksMax of the unit has room", "wait"] = 128
RECEIVED_THREADS: Annotated[int, "threads", "guess: of a client, for what senders sent along", "wait"] = 4
RECEIVED_STUCK: Annotated[int, "threads", "guess: likewise, a quarter for one sender; 13 in all", "wait"] = 8
OPENING_HELD: Annotated[int, "descriptors", "guess: one owner's requests that are being opened", "RateLimited"] = 128
CLOSING_HELD: Annotated[int, "descriptors", "guess: of one owner, that wait to be closed", "RateLimited"] = 128
LOOKED_AT_ONCE: Annotated[int, "nodes", "measured: 30 us each, less than an open; of one request", "next turn"] = 4
GROUPS_PER_CONNECT: Annotated[int, "groups", "measured: 65,536 take 1 ms", "counts as one connection more"] = 1024
REFUSED_AT_ONCE: Annotated[int, "connections", "guess: while the policy is broken", "next turn"] = 64
DEVICES_KEPT: Annotated[
    int, "devices", "guess: that are found again and again; a descriptor each", "all are closed"
] = 32
FLIGHT_LOOK_MS: Annotated[int, "milliseconds", "guess: a look at all unread sockets takes 1 ms", "wait"] = 50

# --- the service as a whole
DESCRIPTORS: Annotated[int, "descriptors", "RLIMIT_NOFILE asked for; the hard limit wins", "accepting pauses"] = 65_536
DESCRIPTORS_RESERVED: Annotated[int, "descriptors", "links, one batch twice (64 node, 64 open)", "accepting pauses"] = (
    192
)
FOR_ADMINISTRATORS: Annotated[int, "connections", "guess: the last ones, so that Admin works", "QuotaExceeded"] = 16
ACCEPT_PAUSE_MS: Annotated[int, "milliseconds", "guess: EMFILE is over when others closed", "tries again"] = 100
BROKEN_SECONDS: Annotated[int, "seconds", "design: after the last client that a broken policy refused", "exit 78"] = 10
BROKEN_LOOK_SECONDS: Annotated[int, "seconds", "design: a broken policy's files are looked at so often", "refused"] = 1
STOP_SECONDS: Annotated[int, "seconds", "design: SIGTERM answers what is in flight", "children are killed"] = 5
DRAIN_SECONDS: Annotated[int, "seconds", "guess: of STOP_SECONDS, for what clients have yet to take", "disconnect"] = 3
POLICY_SECONDS: Annotated[int, "seconds", "as START_SECONDS: until all use a new policy", "the service ends"] = 40
START_SECONDS: Annotated[int, "seconds", "ten times what was measured at a load of 20 on two CPUs", "start fails"] = 40

# --- the audit
AUDIT_REPEAT_SECONDS: Annotated[int, "seconds", "guess: an admin reads at this pace", "counted, not repeated"] = 10
AUDIT_REFUSALS: Annotated[int, "refusals", "guess: of one user in AUDIT_REPEAT_SECONDS", "counted, not written"] = 32
AUDIT_USERS: Annotated[int, "users", "guess: memory below 32 MiB", "all counts are written"] = 256
AUDIT_VALUE_CHARACTERS: Annotated[int, "characters", "a record stays below PIPE_BUF (4096)", "cut, marked by …"] = 512
RECIPIENTS_OF_OWNER: Annotated[int, "uids", "guess: of messages to all who are here", "those are left out"] = 4
RECORDS_PER_CONNECTION: Annotated[
    int, "records", "measured: the first has what the journal has not", "a connection's first record costs so many more"
] = 1
RECORDS_PER_MESSAGE: Annotated[
    int, "records", "measured: with grants, below 4 GiB a day", "a message costs so many"
] = 4
BYTES_PER_RECORD: Annotated[int, "bytes", "likewise: each costs one record more", "-"] = 128

# --- messages
TOPICS: Annotated[int, "topics", "guess; a connection's rights are a bit for each", "load fails"] = 256
TOPIC_BYTES: Annotated[int, "bytes", "guess: a name that people read", "load fails"] = 64
SUBSCRIBER_MESSAGES: Annotated[int, "messages", "guess: that wait for one subscriber", "the oldest is lost"] = 1000
SUBSCRIBER_BYTES: Annotated[int, "bytes", "guess: sixteen of the longest", "the oldest is lost"] = 1_048_576
DESCRIPTORS_PER_MESSAGE: Annotated[int, "descriptors", "design", "disconnect"] = 16
HELD_DESCRIPTORS: Annotated[int, "descriptors", "guess: that one user's messages hold", "QuotaExceeded"] = 256
HELD_BYTES: Annotated[int, "bytes", "guess: of memfds that one user's messages hold", "QuotaExceeded"] = 268_435_456
UNREAD_DESCRIPTORS: Annotated[
    int, "descriptors", "guess: sent to a subscriber, not received", "the message is lost"
] = 32
UNREAD_OF_USER: Annotated[int, "descriptors", "guess: sixteen subscribers, or ended ones", "the message is lost"] = 512
ATTACHED_BYTES: Annotated[int, "bytes", "design: a payload in a memfd, where a topic says nothing", "EMSGSIZE"] = (
    67_108_864
)
ATTACHED_BYTES_MAX: Annotated[int, "bytes", "as HELD_BYTES", "load fails"] = 268_435_456
USERS: Annotated[int, "users", "guess: each broadcast that is stored has a row for each", "load fails"] = 4096
ROWS_PER_MESSAGE: Annotated[int, "rows", "measured: of the store, take as long as a message", "it counts as more"] = 16
KEEP_SECONDS: Annotated[int, "seconds", "design: 7d, where a topic says nothing", "the message is removed"] = 604_800
STORE_BYTES: Annotated[int, "bytes", "guess: a thousand users with 1 MiB each", "ENOSPC"] = 1_073_741_824
STORE_RESERVE_BYTES: Annotated[int, "bytes", "guess: four times SQLite's log", "without: ENOSPC"] = 16_777_216
RECEIVED_MESSAGES: Annotated[int, "messages", "guess: in one reply to Receive", "the next Receive has them"] = 1000
RECEIVED_BYTES: Annotated[int, "bytes", "guess: four of the longest; one always fits", "likewise"] = 262_144
ACKNOWLEDGED: Annotated[int, "messages", "as many as one reply has", "InvalidParameter"] = 1000

# --- fairness: the inbox counts a user's work in units of about 5 us
UNIT_US: Annotated[int, "microseconds", "measured: a read, or a small message", "-"] = 5
UNITS_OF_START: Annotated[int, "units", "measured: of CPU time, until the inbox serves", "a slow machine's unit"] = (
    20_000
)
LONG_UNITS: Annotated[int, "units", "guess: for one message, 0.3 ms", "it counts by its time"] = 60
STALL_UNITS: Annotated[int, "units", "guess: for one message, 5 ms", "the user pauses"] = 1000
STALL_PAUSE: Annotated[int, "times", "guess: what it took, so that it is one percent of the time", "-"] = 100
UNITS_PER_REQUEST: Annotated[
    int, "units", "a read, a message and its resource, and beside it a message sent", "a user's budget: times its rate"
] = 6
UNITS_PER_RESOURCE: Annotated[int, "units", "measured: the opener's part of one of a batch", "-"] = 2
BYTES_PER_UNIT: Annotated[int, "bytes", "guess: reading and decoding them", "counts as more"] = 8192
DELIVERED_BYTES_PER_UNIT: Annotated[int, "bytes", "measured: to subscribers, joined and sent", "likewise"] = 16_384
DELIVERIES_PER_UNIT: Annotated[
    int, "deliveries", "measured: a send to each subscriber for all of a turn", "likewise"
] = 16
VALUES_PER_UNIT: Annotated[int, "values", "measured: objects and arrays of JSON, 0.1 us each", "counts as more"] = 64
TURN_UNITS: Annotated[int, "units", "guess: what one user may delay others by", "next turn"] = 8
TURN_UNITS_ALONE: Annotated[int, "units", "guess: the same, while nobody else has work", "next turn"] = 2048
UNDIVIDED_FACTOR: Annotated[int, "times", "guess: work above TURN_UNITS that cannot be divided counts as more", "-"] = 4
ASKED_AT_ONCE: Annotated[int, "resources", "guess: of one user, that the opener has yet to open", "the others wait"] = 2
CONTEST_SECONDS: Annotated[int, "seconds", "guess: since another user had work", "nobody has to rest"] = 1
KNOCKS_FREE: Annotated[
    int, "connections", "guess: of one user in DEBT_SECONDS, while others of it wait", "an offence each"
] = 16
REST_MS: Annotated[
    int, "milliseconds", "guess: the first rest; shorter ones cost more than they save", "twice as long each time"
] = 50
DEBT_SECONDS: Annotated[int, "seconds", "design: the longest rest, or wait for a connection", "no more is owed"] = 1
OFFENCES_FREE: Annotated[
    int, "offences", "guess: of one user, before they cost something", "each costs twice the last"
] = 32
OFFENCES_SECONDS: Annotated[int, "seconds", "guess: without an offence", "they are forgotten"] = 5
IDLE_SECONDS: Annotated[int, "seconds", "guess: after it a budget is full again", "it is forgotten"] = 60

# --- the bridges
BRIDGE_MESSAGES: Annotated[int, "messages", "guess: that wait for the broker", "the oldest is dropped"] = 1000
BRIDGE_BYTES: Annotated[int, "bytes", "guess: sixteen of the longest", "the oldest is dropped"] = 1_048_576
BRIDGE_LOSSES_SECONDS: Annotated[int, "seconds", "guess: an admin reads at this pace", "counted, then said"] = 10
BUS_SECONDS: Annotated[int, "seconds", "guess: a bus or a desktop that is asked answers", "an error; given up"] = 10
NOTIFICATION_SUMMARY: Annotated[int, "characters", "guess: more than a desktop shows", "cut, marked by …"] = 200
NOTIFICATION_BODY: Annotated[int, "characters", "guess: more than a desktop shows", "cut, marked by …"] = 2000
NOTIFICATIONS_PER_SECOND: Annotated[int, "notifications", "guess: on average, of all users", "dropped, counted"] = 5
NOTIFICATIONS_BURST: Annotated[int, "notifications", "guess: at once, of all users", "dropped, counted"] = 20
NOTIFICATIONS_PER_USER: Annotated[int, "notifications", "guess: a second, of one user", "dropped, counted"] = 1
NOTIFICATIONS_PER_USER_BURST: Annotated[int, "notifications", "guess: at once, of one user", "dropped, counted"] = 5
NOTIFICATION_USERS: Annotated[int, "users", "guess: that send within a minute", "dropped, counted"] = 256

# --- the policy
POLICY_FILE_BYTES: Annotated[int, "bytes", "guess: a large policy is 20 KiB; the parser is slow", "load fails"] = (
    262_144
)
POLICY_BYTES: Annotated[int, "bytes", "measured: of all files, loading takes 10 s", "load fails"] = 1_048_576
POLICY_FILES: Annotated[int, "files", "guess", "load fails"] = 256
POLICY_GROUPS: Annotated[int, "groups", "half of LINK_BYTES: all that a client may be in", "load fails"] = 16_384
POLICY_DEPTH: Annotated[int, "levels", "the deepest valid policy has 6", "load fails"] = 16
POLICY_FINDINGS: Annotated[int, "errors or warnings", "guess: nobody reads more at once", "the rest is counted"] = 200
WAIT_LIMIT_MS: Annotated[int, "milliseconds", "guess: what RateLimited promises at most", "capped"] = 10_000
JOURNAL_RETRY_MS: Annotated[int, "milliseconds", "guess: what RateLimited says when the journal is full", "-"] = 100
BUSY_RETRY_MS: Annotated[int, "milliseconds", "guess: … when too many descriptors are on their way", "-"] = 1000


def reserved(descriptors: int) -> int:
    """Of a process that may have so many descriptors open, how many are not for connections."""
    return max(DESCRIPTORS_RESERVED, descriptors // 16)


def shared(most: int) -> int:
    """Of a maximum for all owners together: the part that owners may use who have something in use already."""
    return most - most // 4


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
    "namespaces": UserLimit(16, 1, 64, "living namespaces that the broker made"),
    "subscriptions": UserLimit(16, 1, 1024, "connections that wait for messages"),
    "stored_messages": UserLimit(1000, 1, 1_000_000, "messages sent and stored until all who should have got them"),
    "stored_bytes": UserLimit(16_777_216, 1, 1_073_741_824, "bytes of these messages"),
    "leases": UserLimit(256, 1, 65_536, "descriptors that the broker still tracks (none in this version)"),
}
