"""Whether a namespace's descriptor would be of use to a program, as far as this program can see.

Runs in: an admin's or a user's shell, without any right. The broker says it with each grant; this is for `explain`.
"""

from __future__ import annotations

import contextlib
import os

from fdbroker.kernel import namespaces
from fdbroker.kernel.namespaces import Caller, NotANamespace
from fdbroker.kernel.pinned import Process
from fdbroker.terms import Namespace, Resource, Subject
from fdbroker.topics import TopicUse
from fdbroker.wire.worker import UNUSABLE

_EVERYTHING = (1 << 64) - 1


def usable(resource: Resource | TopicUse, subject: Subject, *, itself: bool) -> str | None:
    """Why setns(2) would fail for the subject, "" if it would not, None for what is no namespace or cannot be seen.

    `itself`: for this very process; else for one of the subject's in our user namespace, which has every capability
    if it is root's and none if not.
    """
    if not isinstance(resource, Namespace):
        return None
    with contextlib.ExitStack() as owned:
        try:
            with Process(os.getpid()) as own:
                user, effective = own.namespace("user"), own.status().effective
            owned.callback(os.close, user)
            if not itself:
                effective = 0 if subject.uid else _EVERYTHING
            descriptor = _look(resource)
            owned.callback(os.close, descriptor)
            caller = Caller(user, subject.uid, effective)
            if not resource.name and not resource.pid:
                return UNUSABLE[namespaces.why_unusable_owned(resource.type, caller)]
            return UNUSABLE[namespaces.why_unusable(descriptor, resource.type, caller)]
        except (OSError, NotANamespace):
            return None


def _look(resource: Namespace) -> int:
    if resource.name:
        return namespaces.open_named(resource.name)
    with Process(resource.pid or os.getpid()) as process:
        return process.namespace(resource.type)
