"""Of what an input device says, the chosen events are told, each as JSON, and of the others nothing, not how many."""

from __future__ import annotations

import json
from collections.abc import Iterator

from evdev import ecodes

from fdbroker.bridges.evdev import EVENT, choose, messages

CHOSEN = choose(["KEY_F13", "EV_SW", "REL_WHEEL"])
DEVICE = "/dev/input/event7"
WORDS = (EVENT.pack(0, 0, ecodes.EV_SYN, 3, 0), EVENT.pack(1, 2, ecodes.EV_KEY, ecodes.KEY_F13, 1), b"\x01\0\xb7\0")


class Losses:
    count = 0

    def add(self, why: str, count: int = 1) -> None:
        self.count += count


def seeds() -> Iterator[bytes]:
    rows = [(ecodes.EV_KEY, ecodes.KEY_F13, 1), (ecodes.EV_KEY, ecodes.KEY_A, 1), (ecodes.EV_SW, ecodes.SW_LID, 1)]
    rows += [(ecodes.EV_REL, ecodes.REL_WHEEL, -1), (ecodes.EV_SYN, ecodes.SYN_DROPPED, 0), (ecodes.EV_MSC, 4, 7)]
    for row in rows:
        yield EVENT.pack(1_700_000_000, 999_999, *row)
    yield b"".join(EVENT.pack(2**63, 2**64 - 1, *row) for row in rows)


def target(data: bytes) -> None:
    data = data[: len(data) // EVENT.size * EVENT.size]  # read(2) of evdev gives whole ones; read_all ends otherwise
    losses = Losses()
    told = [json.loads(text) for text in messages(data, DEVICE, CHOSEN, losses)]
    rows = list(EVENT.iter_unpack(data))
    wanted = [row for row in rows if (row[2], row[3]) in CHOSEN]
    assert losses.count == sum((kind, code) == (0, ecodes.SYN_DROPPED) for _, _, kind, code, _ in rows)
    assert [(one["value"], one["time_us"]) for one in told] == [(row[4], row[0] * 10**6 + row[1]) for row in wanted]
    for one, row in zip(told, wanted, strict=True):
        assert one["device"] == DEVICE
        assert getattr(ecodes, one["code"]) == row[3]
        assert getattr(ecodes, one["type"]) == row[2]
