"""Bytes become messages however they are cut; what may not be read yet waits where it is."""

import asyncio
import socket

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.wire import encoding, greeting, incoming

HELLO = messages.Register("worker/0", 1)


class Transport:
    """Keeps what was written, and whether reading is paused."""

    def __init__(self):
        self.written, self.reading, self.aborted = bytearray(), True, False
        self.family = socket.AF_INET

    def get_extra_info(self, name):
        return self

    def write(self, data):
        self.written += data

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True

    def abort(self):
        self.aborted = True


class Loop:
    """The event loop of a connection in a test: nothing happens later unless the test says so."""

    def __init__(self):
        self.now, self.later = 0.0, []

    def time(self):
        return self.now

    def call_later(self, seconds, action):
        self.later.append(action)

    def call_soon_threadsafe(self, action):
        self.later.append(action)

    def run(self):
        due, self.later = self.later, []
        for action in due:
            action()


SCRATCH = memoryview(bytearray(incoming.SCRATCH_BYTES))


class End:
    """One connection that has greeted."""

    def __init__(self, lane=incoming.BULK, room=1 << 30):
        self.loop, self.transport, self.got, self.open = Loop(), Transport(), [], {}
        self.budget = incoming.Budget(room)
        self.connection = incoming.Incoming(
            self.loop,
            "token",
            self.budget,
            dict.fromkeys((incoming.CONTROL, incoming.BULK), lambda *arrived: self.got.append(arrived)),
            self.open,
            SCRATCH,
        )
        self.connection.connection_made(self.transport)
        answer, self.expected = greeting.answer("token", bytes(self.transport.written), lane)
        self.hear(answer)
        assert self.transport.written[greeting.CHALLENGE_BYTES :] == self.expected
        self.transport.written.clear()

    def hear(self, data, most=1 << 20):
        """Give the bytes to the connection, as the event loop does; return those left when reading is paused."""
        data = memoryview(data)
        while data and self.transport.reading and not self.transport.aborted:
            memory = self.connection.get_buffer(-1)
            count = min(len(data), len(memory), most)
            memory[:count] = data[:count]
            data = data[count:]
            self.connection.buffer_updated(count)
        return data

    def messages(self):
        return [message for message, _ in self.got]


def transfer(number, size=30_000):
    state = messages.ShardState(0, 0, 0, (np.arange(size, dtype=np.float32),), (), (), (), 0, (), (), (), None)
    return messages.Transfer(0, 1, number, state)


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=4), st.lists(st.booleans(), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_messages_are_whole_and_in_order_however_their_bytes_are_cut(cuts, large):
    sent = [transfer(n) if each else messages.Register("worker/0", n) for n, each in enumerate(large)]
    data, end, number = b"".join(map(encoding.to_bytes, sent)), End(), 0
    while data:
        size = cuts[number % len(cuts)]
        assert not end.hear(data[:size], most=size)
        data, number = data[size:], number + 1
    assert [encoding.to_bytes(message) for message in end.messages()] == [*map(encoding.to_bytes, sent)]


def test_a_connection_is_read_no_further_while_too_many_messages_wait():
    end = End(incoming.CONTROL)
    sent = [messages.Register("worker/0", n) for n in range(2 * incoming.MOST_WAITING)]
    left = end.hear(b"".join(map(encoding.to_bytes, sent)))
    assert end.messages() == sent[: incoming.MOST_WAITING]
    assert not end.transport.reading
    for _, handled in end.got[:3]:
        handled()
    end.loop.run()
    assert end.messages() == sent[: incoming.MOST_WAITING + 3]
    for _ in range(2 * incoming.MOST_WAITING):
        for _, handled in end.got:
            handled()
        end.got.clear()
        end.loop.run()
        left = end.hear(left)
    assert not left
    assert end.transport.reading


def test_a_large_message_waits_for_memory_and_one_larger_than_all_of_it_goes_alone():
    one, two = encoding.to_bytes(transfer(1)), encoding.to_bytes(transfer(2))
    end = End(room=len(one) + 10)
    left = end.hear(one + two)
    assert [message.index for message in end.messages()] == [1]
    end.loop.run()
    assert len(end.got) == 1
    end.got[0][1]()
    end.loop.run()
    assert not end.hear(left)
    assert [message.index for message in end.messages()] == [1, 2]
    alone = End(room=100)
    assert not alone.hear(one)
    assert [message.index for message in alone.messages()] == [1]


def test_memory_of_a_message_that_ends_early_is_free_again():
    one = encoding.to_bytes(transfer(1))
    end = End(room=len(one))
    end.hear(one[:-100])
    assert not end.budget.take(1, lambda: None)
    end.connection.connection_lost(None)
    assert end.budget.take(len(one), lambda: None)
    assert not end.open
    damaged = End(room=len(one))
    damaged.hear(one[:-100] + bytes(100))
    assert damaged.transport.aborted
    assert damaged.budget.take(len(one), lambda: None)
    assert not damaged.got


def test_the_sender_of_large_messages_is_told_how_many_were_handled():
    end = End()
    end.hear(encoding.to_bytes(transfer(1)) + encoding.to_bytes(transfer(2)))
    end.loop.run()
    assert not end.transport.written
    end.got[0][1]()
    end.loop.run()
    assert end.transport.written == incoming.ACK.pack(1, 0)
    end.got[1][1]()
    end.loop.run()
    assert end.transport.written[incoming.ACK.size :] == incoming.ACK.pack(2, 0)
    end.loop.run()
    assert not end.loop.later
    control = End(incoming.CONTROL)
    control.hear(encoding.to_bytes(HELLO))
    assert not control.loop.later


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n" * 4, bytes(100), encoding.MAGIC + b"\xff" * 100])
def test_bytes_that_are_no_message_end_the_connection(data, caplog):
    end = End()
    end.hear(data)
    assert end.transport.aborted
    assert not end.got
    assert "refused" in caplog.text


def test_a_large_message_on_a_control_connection_is_refused():
    end = End(incoming.CONTROL)
    end.hear(encoding.to_bytes(transfer(1, incoming.SMALL_BYTES // 4)))
    assert end.transport.aborted


def test_a_stranger_holds_its_connection_for_seconds_and_says_nothing_that_is_read(caplog):
    end = incoming.Incoming(Loop(), "token", incoming.Budget(1), {}, {}, SCRATCH)
    end.connection_made(made := Transport())
    end.look(incoming.GREETING_SECONDS / 2)
    assert not made.aborted
    end.look(incoming.GREETING_SECONDS + 1)
    assert made.aborted
    guess = incoming.Incoming(Loop(), "token", incoming.Budget(1), {}, {}, SCRATCH)
    guess.connection_made(made := Transport())
    data = greeting.answer("guess", bytes(made.written), 1)[0] + encoding.to_bytes(HELLO)
    guess.get_buffer(-1)[: len(data)] = data
    guess.buffer_updated(len(data))
    assert made.aborted
    assert not caplog.text


def test_a_peer_that_stops_in_a_message_is_given_up_and_one_that_says_nothing_is_not():
    end = End()
    end.connection.look(1e6)
    assert not end.transport.aborted
    end.hear(encoding.to_bytes(transfer(1))[:-1])
    end.connection.look(incoming.IDLE_SECONDS + 1)
    assert end.transport.aborted


def test_the_fake_loop_has_the_methods_of_a_real_one():
    assert all(hasattr(asyncio.AbstractEventLoop, name) for name in ("time", "call_later", "call_soon_threadsafe"))
