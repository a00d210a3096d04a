"""A program without rights that was given two sound devices: plays a tone on 3, records it from 4, says what it heard.

It speaks to the driver itself, without a sound library, for that would open devices by name.
Source: sound/asound.h.
"""

from __future__ import annotations

import array
import fcntl
import json
import math
import os
import struct
import time

PLAYBACK, CAPTURE = 3, 4
RATE, HERTZ, LOUDNESS, SECONDS = 16000, 1000, 12000, 0.4

HW_PARAMS, PREPARE, START = 0xC2604111, 0x4140, 0x4142
# a bit in each mask; which interval says what
RW_INTERLEAVED, S16_LE, STANDARD = 3, 2, 0
INTERVALS = 12
CHANNELS, FRAMES_PER_SECOND, PERIOD_SIZE, BUFFER_SIZE = 2, 3, 5, 9
FIXED = {CHANNELS: 1, FRAMES_PER_SECOND: RATE, PERIOD_SIZE: 800, BUFFER_SIZE: 8000}
INTEGER = 1 << 2


def hw_params() -> bytes:
    """A struct snd_pcm_hw_params: every interval that is not fixed stays open."""
    masks = b"".join((1 << bit).to_bytes(32, "little") for bit in (RW_INTERLEAVED, S16_LE, STANDARD))
    intervals = b"".join(
        struct.pack("III", FIXED[one], FIXED[one], INTEGER) if one in FIXED else struct.pack("III", 0, 0xFFFFFFFF, 0)
        for one in range(INTERVALS)
    )
    head = struct.pack("I", 0) + masks + bytes(5 * 32) + intervals + bytes(9 * 12)
    return head + struct.pack("IIIIII", 0xFFFFFFFF, 0, 0, 0, 0, 0) + bytes(8 + 64)


def main() -> None:
    for descriptor in (PLAYBACK, CAPTURE):
        fcntl.ioctl(descriptor, HW_PARAMS, hw_params())
        fcntl.ioctl(descriptor, PREPARE)
    wave = [round(LOUDNESS * math.sin(2 * math.pi * HERTZ * at / RATE)) for at in range(int(RATE * SECONDS))]
    tone = array.array("h", wave).tobytes()
    fcntl.ioctl(CAPTURE, START)
    while tone:  # starts with the first write
        tone = tone[os.write(PLAYBACK, tone) :]
    heard = array.array("h")
    end_s = time.monotonic() + 10
    loud: list[int] = []
    while len(loud) < RATE * SECONDS / 2 and time.monotonic() < end_s:
        heard.frombytes(os.read(CAPTURE, 1600))
        first = next((at for at, value in enumerate(heard) if abs(value) > LOUDNESS / 2), len(heard))
        loud = list(heard[first:])
    rising = [at for at in range(1, len(loud)) if loud[at - 1] < 0 <= loud[at]]
    hertz = (len(rising) - 1) * RATE / (rising[-1] - rising[0]) if len(rising) > 1 else 0
    print(json.dumps({"uid": os.getuid(), "hertz": hertz, "loudest": max(loud, default=0)}))


main()
