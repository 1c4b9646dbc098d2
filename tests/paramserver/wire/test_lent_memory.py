"""Lent memory holds what was sent while any array is in it, is used again after that, and is refused if it is none."""

import fcntl
import os
import queue
import socket
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.wire import encoding, incoming, lent_memory, same_machine, streams
from jaxdist.paramserver.wire.codec import EncodingError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Memory without a name is Linux's.")
SIZES = st.sampled_from([0, 1, 63, 64, 65, 1000, encoding.PLACED_BYTES - 1, encoding.PLACED_BYTES, 1_200_000])


def transfer(number, *arrays):
    return messages.Transfer(0, 1, number, messages.ShardState(0, 0, 0, arrays, (), (), (), 0, (), (), (), None))


def large(number):
    return transfer(number, np.full(400_000, number, np.float32), np.full(3, -number, np.int64))


def is_whole(message):
    return encoding.to_bytes(message) == encoding.to_bytes(large(message.index))


def assemble(sent, memory):
    """Return the message in `memory` whose other bytes are `sent`."""
    parts, data = encoding.assemble_placed(sent, memory), sent[encoding.PREFIX_BYTES :]
    try:
        while True:
            part = next(parts)
            part[:], data = data[: len(part)], data[len(part) :]
    except StopIteration as end:
        assert not data
        return end.value


@given(st.lists(SIZES, max_size=5))
@settings(max_examples=30, deadline=None)
def test_a_message_is_the_same_if_its_arrays_are_placed(sizes):
    message = transfer(1, *(np.arange(size).astype(np.uint8) for size in sizes))
    encoded = encoding.encode(message)
    memory = np.zeros(encoded.placed_bytes, np.uint8)
    found = assemble(b"".join(encoded.place(memory)), memory)
    assert encoding.to_bytes(found) == encoding.to_bytes(message)
    assert all(array.ctypes.data % 64 == memory.ctypes.data % 64 for array in found.state.params if array.size)


def test_damage_and_too_little_memory_are_noticed():
    encoded = encoding.encode(large(1))
    memory = np.zeros(encoded.placed_bytes, np.uint8)
    sent = b"".join(encoded.place(memory))
    with pytest.raises(EncodingError, match="ends before an array"):
        assemble(sent, memory[:-64])
    memory[1_599_999] ^= 1
    with pytest.raises(EncodingError, match="Array 0 of a Transfer message is damaged"):
        assemble(sent, memory)


@pytest.fixture
def ends():
    """Two ends of a wire, and the queue in which what the second one receives is put."""
    heard = queue.Queue()
    first = streams.Wire(listen="127.0.0.1:0", peers={}, receive=lambda *_: None)
    second = streams.Wire(
        listen="127.0.0.1:0", peers={}, receive=lambda message, handled: (handled(), heard.put(message))
    )
    first.peers["peer"] = f"127.0.0.1:{second.port}"
    yield first, second, heard
    first.close()
    second.close()


def lender_of(wire):
    return wire._outgoing["peer", incoming.BULK]._lender


def test_memory_is_used_again_only_when_no_array_is_in_it(ends):
    first, _, heard = ends
    held = []
    for number in range(1, 30):
        first.send("peer", large(number))
        message = heard.get(timeout=200)
        assert is_whole(message)
        assert not message.state.params[0].flags.writeable
        if number % 10 == 0:
            held.append(message.state.params[0][5:10])  # a view is enough
        del message
    assert [view.tolist() for view in held] == [[number] * 5 for number in (10, 20)]
    assert lender_of(first)._number <= 3


def test_a_receiver_that_keeps_all_memory_gets_more_through_the_socket(ends):
    first, _, heard = ends
    kept = []
    for number in range(1, 2 * lent_memory.MOST_SEGMENTS):
        first.send("peer", large(number))
        kept.append(heard.get(timeout=200))
    assert all(map(is_whole, kept))
    lender = lender_of(first)
    assert sorted(lender._lent) == [1, 2, 3]


def test_arrays_outlive_the_sender_and_the_connection(ends):
    first, second, heard = ends
    first.send("peer", large(1))
    message = heard.get(timeout=200)
    first.close()
    second.close()
    assert is_whole(message)


def test_messages_take_the_socket_if_there_is_no_memory(ends, monkeypatch):
    def fail(*_):
        raise OSError("no memory")

    monkeypatch.setattr(os, "memfd_create", fail)
    first, _, heard = ends
    for number in (1, 2):
        first.send("peer", large(number))
        assert is_whole(heard.get(timeout=200))


def test_messages_between_machines_are_not_lent(ends, monkeypatch):
    monkeypatch.setattr(same_machine, "name_of", lambda host, port: None)
    first, _, heard = ends
    first.send("peer", large(1))
    assert is_whole(heard.get(timeout=200))
    assert lender_of(first)._number == 0


def test_memory_of_another_size_takes_the_place_of_memory_that_is_free():
    lender = lent_memory.Lender()
    small, _ = lender.lend(1000)
    assert lender.lend(1000)[0].number == 2
    lender.give_back(small.number)
    lender.give_back(small.number)  # an answer that came twice
    assert lender.lend(600)[0] is small
    lender.give_back(small.number)
    other, notice = lender.lend(5000)
    assert (other.number, notice[-8:]) == (3, (1).to_bytes(8, "little"))
    assert lender.lend(1)[0].number == 4
    assert lender.lend(1) is None
    lender.close()
    assert small.descriptor == other.descriptor == -1


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def descriptor_of(size, *seals):
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    for seal in seals:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seal)
    return descriptor


@pytest.mark.parametrize(
    ("size", "declared", "seals"),
    [(4096, 4096, ()), (4096, 8192, (fcntl.F_SEAL_SHRINK,)), (4096, 0, (fcntl.F_SEAL_SHRINK,)), (None, 4096, ())],
    ids=["not sealed", "too short", "empty", "none"],
)
def test_what_is_no_memory_of_the_declared_size_is_refused(pair, size, declared, seals):
    ours, theirs = pair
    descriptors = [] if size is None else [descriptor_of(size, *seals)]
    socket.send_fds(ours, [b"notice"], descriptors)
    borrowed = lent_memory.Borrowed(lambda number: None)
    memory = memoryview(bytearray(100))
    assert bytes(memory[: borrowed.receive(theirs, memory)]) == b"notice"
    with pytest.raises(EncodingError, match="segment of memory"):
        borrowed.memory(lent_memory._NOTICE.pack(lent_memory.MAGIC, 1, declared, 0))
    assert not borrowed._arrived
    for each in descriptors:
        os.close(each)


def test_a_notice_is_the_size_of_a_prefix():
    assert lent_memory._NOTICE.size == encoding.PREFIX_BYTES
