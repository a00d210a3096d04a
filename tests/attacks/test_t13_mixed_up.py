"""T13: the descriptors of two pipelined requests are mixed up."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import time

import pytest
from harness import MEM, Raw, node, running

import fdbroker.aio

POLICY = 'version: 1\neveryone: {devices: [{path: "/dev/pool/*"}]}\nlimits: {unread_grants: 1024}\n'
DEVICES = [MEM["null"], MEM["zero"], MEM["full"], MEM["urandom"]]


def _call(*indexes):
    resources = [{"device": f"/dev/pool/{index}"} for index in indexes]
    return json.dumps({"method": "io.fdbroker.Broker.Open", "parameters": {"resources": resources}}).encode() + b"\0"


@pytest.mark.parametrize("pieces", ["whole", "byte by byte", "random"])
def test_answer_k_has_resource_k(dev, pieces):
    for index, rdev in enumerate(DEVICES):
        node(f"/dev/pool/{index}", rdev)
    choice = random.Random(7)
    wanted = [[choice.randrange(5) for _ in range(choice.randrange(1, 4))] for _ in range(60)]
    data = b"".join(_call(*indexes) for indexes in wanted)
    with running(POLICY) as broker, Raw(broker.socket) as client:
        if pieces == "whole":
            client.sock.sendall(data)
        else:
            at = 0
            while at < len(data):
                size = 1 if pieces == "byte by byte" else choice.randrange(1, 300)
                client.sock.sendall(data[at : at + size])
                at += size
        time.sleep(0.1)
        for indexes in wanted:
            reply = client.reply()
            if 4 in indexes:  # there is no /dev/pool/4
                assert reply["error"] == "io.fdbroker.Broker.NoSuchResource"
                continue
            names = [grant["resource"]["device"] for grant in reply["parameters"]["grants"]]
            assert names == [f"/dev/pool/{index}" for index in indexes]
            for index in indexes:
                number = client.take()
                assert os.fstat(number).st_rdev == DEVICES[index]
                os.close(number)
        assert not client.descriptors


def test_a_slow_reader_gets_them_right_too(dev):
    for index, rdev in enumerate(DEVICES):
        node(f"/dev/pool/{index}", rdev)
    with running(POLICY) as broker, Raw(broker.socket) as client:
        client.sock.sendall(b"".join(_call(index % 4) for index in range(40)))
        for index in range(40):
            while b"\0" not in client.buffer:
                data, numbers, _, _ = socket.recv_fds(client.sock, 7, 253)
                client.buffer += data
                client.descriptors += numbers
            _, _, client.buffer = client.buffer.partition(b"\0")
            number = client.take()
            assert os.fstat(number).st_rdev == DEVICES[index % 4]
            os.close(number)


def test_many_tasks_on_one_asyncio_client_get_each_its_own(dev):
    for index, rdev in enumerate(DEVICES):
        node(f"/dev/pool/{index}", rdev)

    async def one(client, index):
        descriptor = await client.open(f"/dev/pool/{index % 4}")
        with descriptor:
            assert os.fstat(descriptor.fileno()).st_rdev == DEVICES[index % 4]

    async def everything(address):
        async with await fdbroker.aio.connect(address) as client:
            await asyncio.gather(*(one(client, index) for index in range(200)))

    with running(POLICY) as broker:
        asyncio.run(everything(broker.socket))
