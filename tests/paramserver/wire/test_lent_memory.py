"""Lent memory holds what was sent while any array is in it, is used again after that, and is refused if it is none."""

import dataclasses
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


def loan(size):
    """Return a loan of so many bytes, and the memory that its owner writes to."""
    segment = lent_memory.Segment(1, max(size, 1))
    mapped = lent_memory._Mapped(segment.take_descriptor(), segment.size)
    return lent_memory.Loan(mapped, lambda: None), segment.memory


def assemble(sent, lent):
    """Return the message in a loan whose other bytes are `sent`."""
    parts, data = encoding.assemble_placed(sent, lent), sent[encoding.PREFIX_BYTES :]
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
    lent, memory = loan(encoded.placed_bytes)
    found = assemble(b"".join(encoded.place(memory)), lent)
    assert encoding.to_bytes(found) == encoding.to_bytes(message)
    again = encoding.encode(dataclasses.replace(found, index=2))
    if any(sizes):
        assert lent_memory.loan_of(again.arrays) is lent
    passed = assemble(again.placed(lent.checksums), lent)
    assert encoding.to_bytes(passed) == encoding.to_bytes(dataclasses.replace(message, index=2))
    memory = np.asarray(lent)
    assert all(array.ctypes.data % 64 == memory.ctypes.data % 64 for array in found.state.params if array.size)


def test_damage_and_too_little_memory_are_noticed():
    encoded = encoding.encode(large(1))
    lent, memory = loan(encoded.placed_bytes)
    sent = b"".join(encoded.place(memory))
    with pytest.raises(EncodingError, match="ends before an array"):
        assemble(sent, loan(encoded.placed_bytes - 64)[0])
    assert is_whole(assemble(sent, lent))
    memory[1_599_999] ^= 1
    for damaged in (sent, encoded.placed(lent.checksums)):
        with pytest.raises(EncodingError, match="Array 0 of a Transfer message is damaged"):
            assemble(damaged, lent)


def test_other_arrays_than_all_of_a_loan_are_not_passed_on():
    encoded = encoding.encode(large(1))
    lent, memory = loan(encoded.placed_bytes)
    sent = b"".join(encoded.place(memory))
    arrays = assemble(sent, lent).state.params

    def found(*given):
        return lent_memory.loan_of(encoding.encode(transfer(1, *given)).arrays)

    assert found(*arrays) is lent
    assert (
        found(arrays[0])
        is found(*arrays[::-1])
        is found(arrays[0][:-1], arrays[1])
        is found(*arrays, np.ones(3))
        is None
    )
    assert found(arrays[0], arrays[1].copy()) is found(*map(np.copy, arrays)) is found() is None


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


@pytest.fixture
def chain(ends):
    """The ends and their queue, another end that the second one passes messages on to, and its queue."""
    first, second, heard = ends
    passed = queue.Queue()
    third = streams.Wire(
        listen="127.0.0.1:0", peers={}, receive=lambda message, handled: (handled(), passed.put(message))
    )
    second.peers["peer"] = f"127.0.0.1:{third.port}"
    yield first, second, heard, third, passed
    third.close()


def pass_on(chain, number):
    """Send a message from the first end over the second to the third; return what both receive."""
    first, second, heard, _, passed = chain
    first.send("peer", large(number))
    message = heard.get(timeout=200)
    second.send("peer", messages.Transfer(0, 7, message.index, message.state))
    return message, passed.get(timeout=200)


def test_arrays_that_are_sent_on_stay_in_the_memory_of_the_first_sender(chain):
    returned = queue.Queue()
    for number in range(1, 20):
        message, passed = pass_on(chain, number)
        if number == 1:
            lender_of(chain[0]).give_back = returned.put
        assert (passed.term, passed.index) == (7, number)
        assert encoding.to_bytes(passed.state) == encoding.to_bytes(message.state)
        assert is_whole(message)
        del message, passed
        lent_memory.Lender.give_back(lender_of(chain[0]), returned.get(timeout=200))
    first, second = map(lender_of, chain[:2])
    assert first._number == 1
    assert (second._free, second._lent) == ([], {})
    assert len(second._known) == 1


def test_memory_is_used_again_only_when_the_last_of_all_receivers_has_returned_it(chain):
    kept = [pass_on(chain, number)[1] for number in range(1, 1 + lent_memory.MOST_SEGMENTS)]
    first = lender_of(chain[0])
    for number in range(4, 8):  # through the socket, so the memory of the third sees none of them
        pass_on(chain, number)
    assert sorted(first._lent) == [1, 2, 3]
    assert [each.state.params[0][0] for each in kept] == [1, 2, 3]


def test_what_was_passed_on_outlives_both_connections_and_is_returned_with_the_last_one():
    returned = []
    borrowed, lender = lent_memory.Borrowed(returned.append), lent_memory.Lender()
    segment = lent_memory.Segment(5, 4096)
    borrowed._arrived.append(segment.take_descriptor())
    lent = borrowed.loan(lent_memory._NOTICE.pack(lent_memory.MAGIC, 5, 4096, 0))
    descriptor, _ = lender.pass_on(lent)
    assert lender.pass_on(lent)[0] == -1  # sent again, for example in another term
    borrowed.close()
    del lent
    lender.give_back(1)
    lender.give_back(9)  # of no segment
    assert returned == []
    lender.close()
    assert returned == [5]
    os.close(descriptor)


def test_a_receiver_is_told_of_memory_whose_owner_is_gone():
    lender = lent_memory.Lender()
    notices = []
    for _ in range(3):
        lent, _ = loan(4096)
        descriptor, notice = lender.pass_on(lent)
        os.close(descriptor)
        del lent
        lender.give_back(lender._number)
        notices.append(lent_memory._NOTICE.unpack(notice)[1::2])
    assert notices == [(1, 0), (2, 1), (3, 2)]
    assert sorted(lender._known) == [3]


def test_without_a_descriptor_what_is_sent_on_is_copied(chain, monkeypatch):
    def fail(_):
        raise OSError("too many open files")

    monkeypatch.setattr(lent_memory.Lender, "pass_on", lambda *_: None)
    assert is_whole(pass_on(chain, 1)[0])
    monkeypatch.undo()
    lent, _ = loan(4096)
    monkeypatch.setattr(os, "dup", fail)
    assert lent_memory.Lender().pass_on(lent) is None


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
        borrowed.loan(lent_memory._NOTICE.pack(lent_memory.MAGIC, 1, declared, 0))
    assert not borrowed._arrived
    for each in descriptors:
        os.close(each)


def test_a_notice_is_the_size_of_a_prefix():
    assert lent_memory._NOTICE.size == encoding.PREFIX_BYTES
