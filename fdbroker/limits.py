"""Every maximum of the broker: one name, its value, unit, where the number comes from, and what happens above it.

Runs in: every process; imports nothing. docs/limits.md is printed from this table (scripts/docs), a test compares.
"""

from __future__ import annotations

from typing import NamedTuple


class Limit(NamedTuple):
    """One maximum: the value passes, value + 1 does not; then happens what `above` says."""

    value: int
    unit: str
    source: str
    above: str


LIMITS: dict[str, Limit] = {
    # --- the wire
    "MESSAGE_BYTES": Limit(65536, "bytes", "design: one frame or one Varlink message", "EMSGSIZE or disconnect"),
    "RESOURCES_PER_OPEN": Limit(64, "resources", "design; far below SCM_MAX_FD (253)", "InvalidParameter"),
    "REPLY_WITH_DESCRIPTORS_BYTES": Limit(
        32768, "bytes", "unix(7): one skb, so a stream socket takes it whole or not at all", "QuotaExceeded"
    ),
    "PATH_BYTES": Limit(4095, "bytes", "PATH_MAX with its NUL is 4096 (linux/limits.h)", "Denied"),
    "NAME_BYTES": Limit(255, "bytes", "NAME_MAX (linux/limits.h): one path component", "Denied"),
    "LABEL_BYTES": Limit(
        4096, "bytes", "a page, as of /proc/PID/attr/current", "the label counts as unknown; in a policy: load fails"
    ),
    "MESSAGE_SECONDS": Limit(10, "seconds", "design: a message must be complete", "disconnect"),
    "ANSWER_SECONDS": Limit(
        5, "seconds", "guess: a client takes something of an answer that it asked for", "disconnect"
    ),
    "WAITING_BYTES": Limit(134217728, "bytes", "guess: that wait in the inbox for all clients together", "disconnect"),
    "WAITING_SHARE_BYTES": Limit(1048576, "bytes", "guess: of these, the least that one owner may have", "disconnect"),
    "UNSENT_BYTES": Limit(262144, "bytes", "guess: answers that wait for a client that does not read", "disconnect"),
    "OFFERS": Limit(4096, "resources", "guess: a machine has some hundred nodes", "the list is cut"),
    # --- the links between our processes
    "LINK_BYTES": Limit(131072, "bytes", "one request of 64 KiB and its lengths fit twice", "the service ends"),
    "KEPT_VALUES": Limit(256, "values", "guess: what programs ask for again and again", "all are forgotten"),
    "KEPT_BYTES": Limit(2048, "bytes", "guess: sixteen resources with long paths", "not remembered"),
    "LINK_WAITING": Limit(131072, "messages", "guess: five for each of 20,000 connections", "the service ends"),
    "POLICY_LINK_BYTES": Limit(16777216, "bytes", "guess: a large policy, compiled, is 1 MiB", "load fails"),
    # --- the namespaces worker
    "NAMESPACE_SECONDS": Limit(5, "seconds", "guess: a thousand times what it takes", "OpenFailed (ETIMEDOUT)"),
    "MOUNTS": Limit(
        4096, "mounts", "measured: sixteen copies take 25 MiB of the kernel's memory", "OpenFailed (ENOSPC)"
    ),
    "NAMESPACE_STOPPED_MS": Limit(500, "milliseconds", "design: its caller has stopped the child", "OpenFailed"),
    "NAMESPACE_REQUESTS": Limit(16, "requests", "guess: each is a process for a moment; one of each user", "wait"),
    "NAMESPACE_HELD": Limit(128, "descriptors", "guess: one user's requests that wait for more", "RateLimited"),
    "NAMESPACE_WAIT_SECONDS": Limit(10, "seconds", "guess: twice what the worker gives a child", "OpenFailed"),
    # --- what can sleep in the kernel
    "OPENING_THREADS": Limit(16, "threads", "guess: of different owners at the same time, in the opener", "wait"),
    "CLOSING_THREADS": Limit(32, "threads", "guess: of different owners, in opener and inbox each", "wait"),
    "STUCK_SECONDS": Limit(1, "seconds", "guess: of a job that a thread does", "another thread goes on"),
    "STUCK_THREADS": Limit(128, "threads", "guess: a quarter for one owner; TasksMax of the unit has room", "wait"),
    "OPENING_HELD": Limit(128, "descriptors", "guess: one owner's requests that are being opened", "RateLimited"),
    "CLOSING_HELD": Limit(128, "descriptors", "guess: of one owner, that wait to be closed", "RateLimited"),
    "LOOKED_AT_ONCE": Limit(4, "nodes", "measured: 30 us each, less than an open; of one request", "next turn"),
    "GROUPS_PER_CONNECT": Limit(1024, "groups", "measured: 65,536 take 1 ms", "counts as one connection more"),
    "REFUSED_AT_ONCE": Limit(64, "connections", "guess: while the policy is broken", "next turn"),
    "FLIGHT_LOOK_MS": Limit(50, "milliseconds", "guess: a look at all unread sockets takes 1 ms", "wait"),
    # --- the service as a whole
    "DESCRIPTORS": Limit(65536, "descriptors", "RLIMIT_NOFILE asked for; the hard limit wins", "accepting pauses"),
    "DESCRIPTORS_RESERVED": Limit(192, "descriptors", "links, one batch twice (64 node, 64 open)", "accepting pauses"),
    "FOR_ADMINISTRATORS": Limit(16, "connections", "guess: the last ones, so that Admin works", "QuotaExceeded"),
    "ACCEPT_PAUSE_MS": Limit(100, "milliseconds", "guess: EMFILE is over when others closed", "tries again"),
    "BROKEN_SECONDS": Limit(10, "seconds", "design: after the last client that a broken policy refused", "exit 78"),
    "BROKEN_LOOK_SECONDS": Limit(1, "seconds", "design: a broken policy's files are looked at so often", "refused"),
    "STOP_SECONDS": Limit(5, "seconds", "design: SIGTERM answers what is in flight", "children are killed"),
    "START_SECONDS": Limit(40, "seconds", "ten times what was measured at a load of 20 on two CPUs", "start fails"),
    # --- the audit
    "AUDIT_REPEAT_SECONDS": Limit(10, "seconds", "guess: an admin reads at this pace", "counted, not repeated"),
    "AUDIT_REFUSALS": Limit(32, "refusals", "guess: of one user in AUDIT_REPEAT_SECONDS", "counted, not written"),
    "AUDIT_USERS": Limit(256, "users", "guess: memory below 32 MiB", "all counts are written"),
    "AUDIT_VALUE_CHARACTERS": Limit(512, "characters", "a record stays below PIPE_BUF (4096)", "cut, marked by …"),
    "RECIPIENTS_OF_OWNER": Limit(4, "uids", "guess: of messages to all who are here", "those are left out"),
    "RECORDS_PER_CONNECTION": Limit(
        1,
        "records",
        "measured: the first has what the journal has not",
        "a connection's first record costs so many more",
    ),
    "RECORDS_PER_MESSAGE": Limit(4, "records", "measured: with grants, below 4 GiB a day", "a message costs so many"),
    "BYTES_PER_RECORD": Limit(128, "bytes", "likewise: each costs one record more", "-"),
    # --- messages
    "TOPICS": Limit(256, "topics", "guess; a connection's rights are a bit for each", "load fails"),
    "TOPIC_BYTES": Limit(64, "bytes", "guess: a name that people read", "load fails"),
    "SUBSCRIBER_MESSAGES": Limit(1000, "messages", "guess: that wait for one subscriber", "the oldest is lost"),
    "SUBSCRIBER_BYTES": Limit(1048576, "bytes", "guess: sixteen of the longest", "the oldest is lost"),
    "DESCRIPTORS_PER_MESSAGE": Limit(16, "descriptors", "design", "disconnect"),
    "HELD_DESCRIPTORS": Limit(256, "descriptors", "guess: that one user's messages hold", "QuotaExceeded"),
    "HELD_BYTES": Limit(268435456, "bytes", "guess: of memfds that one user's messages hold", "QuotaExceeded"),
    "UNREAD_DESCRIPTORS": Limit(32, "descriptors", "guess: sent to a subscriber, not received", "the message is lost"),
    "UNREAD_OF_USER": Limit(512, "descriptors", "guess: sixteen subscribers, or ended ones", "the message is lost"),
    "ATTACHED_BYTES": Limit(67108864, "bytes", "design: a payload in a memfd, where a topic says nothing", "EMSGSIZE"),
    "ATTACHED_BYTES_MAX": Limit(268435456, "bytes", "as HELD_BYTES", "load fails"),
    "USERS": Limit(4096, "users", "guess: each broadcast that is stored has a row for each", "load fails"),
    "ROWS_PER_MESSAGE": Limit(16, "rows", "measured: of the store, take as long as a message", "it counts as more"),
    "KEEP_SECONDS": Limit(604800, "seconds", "design: 7d, where a topic says nothing", "the message is removed"),
    "STORE_BYTES": Limit(1073741824, "bytes", "guess: a thousand users with 1 MiB each", "ENOSPC"),
    "STORE_RESERVE_BYTES": Limit(16777216, "bytes", "guess: four times SQLite's log", "without: ENOSPC"),
    "RECEIVED_MESSAGES": Limit(1000, "messages", "guess: in one reply to Receive", "the next Receive has them"),
    "RECEIVED_BYTES": Limit(262144, "bytes", "guess: four of the longest; one always fits", "likewise"),
    "ACKNOWLEDGED": Limit(1000, "messages", "as many as one reply has", "InvalidParameter"),
    # --- fairness: the inbox counts a user's work in units of about 5 us
    "UNIT_US": Limit(5, "microseconds", "measured: a read, or a small message", "-"),
    "LONG_WORK_US": Limit(300, "microseconds", "guess: for one message", "it counts by its time"),
    "UNITS_PER_REQUEST": Limit(
        6,
        "units",
        "a read, a message and its resource, and beside it a message sent",
        "a user's budget: times its rate",
    ),
    "UNITS_PER_RESOURCE": Limit(2, "units", "measured: the opener's part of one of a batch", "-"),
    "BYTES_PER_UNIT": Limit(8192, "bytes", "guess: reading and decoding them", "counts as more"),
    "DELIVERIES_PER_UNIT": Limit(16, "deliveries", "measured: to subscribers, several of them in one send", "likewise"),
    "VALUES_PER_UNIT": Limit(64, "values", "measured: objects and arrays of JSON, 0.1 us each", "counts as more"),
    "TURN_UNITS": Limit(8, "units", "guess: what one user may delay others by", "next turn"),
    "TURN_UNITS_ALONE": Limit(2048, "units", "guess: the same, while nobody else has work", "next turn"),
    "UNDIVIDED_FACTOR": Limit(4, "times", "guess: work above TURN_UNITS that cannot be divided counts as more", "-"),
    "ASKED_AT_ONCE": Limit(2, "resources", "guess: of one user, that the opener has yet to open", "the others wait"),
    "CONTEST_SECONDS": Limit(1, "seconds", "guess: since another user had work", "nobody has to rest"),
    "KNOCKS_FREE": Limit(
        16, "connections", "guess: of one user in DEBT_SECONDS, while others of it wait", "an offence each"
    ),
    "REST_MS": Limit(
        50, "milliseconds", "guess: the first rest; shorter ones cost more than they save", "twice as long each time"
    ),
    "DEBT_SECONDS": Limit(1, "seconds", "design: the longest rest, or wait for a connection", "no more is owed"),
    "OFFENCES_FREE": Limit(
        32, "offences", "guess: of one user, before they cost something", "each costs twice the last"
    ),
    "OFFENCES_SECONDS": Limit(5, "seconds", "guess: without an offence", "they are forgotten"),
    "IDLE_SECONDS": Limit(60, "seconds", "guess: after it a budget is full again", "it is forgotten"),
    # --- the bridges
    "BRIDGE_MESSAGES": Limit(1000, "messages", "guess: that wait for the broker", "the oldest is dropped"),
    "BRIDGE_BYTES": Limit(1048576, "bytes", "guess: sixteen of the longest", "the oldest is dropped"),
    "BRIDGE_LOSSES_SECONDS": Limit(10, "seconds", "guess: an admin reads at this pace", "counted, then said"),
    "BUS_SECONDS": Limit(10, "seconds", "guess: a bus or a desktop that is asked answers", "an error; given up"),
    "NOTIFICATION_SUMMARY": Limit(200, "characters", "guess: more than a desktop shows", "cut, marked by …"),
    "NOTIFICATION_BODY": Limit(2000, "characters", "guess: more than a desktop shows", "cut, marked by …"),
    "NOTIFICATIONS_PER_SECOND": Limit(5, "notifications", "guess: on average, of all users", "dropped, counted"),
    "NOTIFICATIONS_BURST": Limit(20, "notifications", "guess: at once, of all users", "dropped, counted"),
    "NOTIFICATIONS_PER_USER": Limit(1, "notifications", "guess: a second, of one user", "dropped, counted"),
    "NOTIFICATIONS_PER_USER_BURST": Limit(5, "notifications", "guess: at once, of one user", "dropped, counted"),
    "NOTIFICATION_USERS": Limit(256, "users", "guess: that send within a minute", "dropped, counted"),
    # --- the policy
    "POLICY_FILE_BYTES": Limit(262144, "bytes", "guess: a large policy is 20 KiB; the parser is slow", "load fails"),
    "POLICY_FILES": Limit(256, "files", "guess", "load fails"),
    "POLICY_DEPTH": Limit(16, "levels", "the deepest valid policy has 6", "load fails"),
    "POLICY_FINDINGS": Limit(200, "errors or warnings", "guess: nobody reads more at once", "the rest is counted"),
    "WAIT_LIMIT_MS": Limit(10000, "milliseconds", "guess: what RateLimited promises at most", "capped"),
    "JOURNAL_RETRY_MS": Limit(100, "milliseconds", "guess: what RateLimited says when the journal is full", "-"),
    "BUSY_RETRY_MS": Limit(1000, "milliseconds", "guess: … when too many descriptors are on their way", "-"),
}


def reserved(descriptors: int) -> int:
    """Of a process that may have so many descriptors open, how many are not for connections."""
    return max(LIMITS["DESCRIPTORS_RESERVED"].value, descriptors // 16)


def shared(most: int) -> int:
    """Of a maximum for all owners together: the part that owners may use who have something in use already."""
    return most - most // 4


def __getattr__(name: str) -> int:
    """`limits.MESSAGE_BYTES` is the value of that row."""
    try:
        return LIMITS[name].value
    except KeyError:
        raise AttributeError(name) from None


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
