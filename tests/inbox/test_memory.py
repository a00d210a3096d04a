"""What waits in the inbox for all clients together: who loses, and who never does."""

from __future__ import annotations

from fdbroker.inbox.memory import Memory
from fdbroker.limits import every as limits


def test_above_the_sum_who_has_more_than_a_share_loses():
    """WAITING_BYTES pass whoever has them; one byte more, and it is not the small ones who lose."""
    memory, most = Memory(), limits.WAITING_BYTES
    assert not memory.is_too_much(2, 20, 1000)
    assert not memory.is_too_much(1, 10, most - 1000)
    assert not memory.is_too_much(2, 20, 1001)
    assert memory.is_too_much(1, 10, most - 999)


def test_a_share_is_never_less_than_this():
    """With very many owners each still has WAITING_SHARE_BYTES."""
    memory, share = Memory(), limits.WAITING_SHARE_BYTES
    owners = 2 * limits.WAITING_BYTES // share
    for owner in range(owners):
        assert not memory.is_too_much(owner, owner, share)
    assert memory.is_too_much(0, 0, share + 1)


def test_an_owner_is_one_with_however_many_connections():
    memory, share = Memory(), limits.WAITING_SHARE_BYTES
    others = limits.WAITING_BYTES // share
    for owner in range(1, 1 + others):
        assert not memory.is_too_much(owner, owner, share)
    first = 1000
    for number in range(first, first + 16):
        assert not memory.is_too_much(0, number, share // 16)
    assert memory.is_too_much(0, first + 16, 1)


def test_who_reads_is_not_ended_and_what_is_gone_is_forgotten():
    memory, most = Memory(), limits.WAITING_BYTES
    assert not memory.is_too_much(1, 1, most)
    assert memory.is_too_much(1, 2, most)
    assert not memory.is_too_much(1, 2, most - 1)
    memory.forget(1, 1)
    memory.forget(1, 2)
    memory.forget(1, 3)
    assert not memory.is_too_much(1, 1, most)
    memory.forget(1, 1)
    assert vars(memory) == vars(Memory())
