"""What waits is sent, what travels is not sent twice, and what a failed connection carried may be sent again."""

import asyncio
import socket

import numpy as np
import pytest

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.wire import encoding, greeting, incoming, outbox, outgoing


class Transport:
    """A connection of which a test decides how much it takes."""

    family = socket.AF_INET

    def __init__(self, end):
        self.end, self.written, self.room, self.aborted = end, bytearray(), 1 << 30, False

    def set_write_buffer_limits(self, high):
        self.high = high

    def get_extra_info(self, name):
        return self

    def setsockopt(self, *_):
        pass

    def get_write_buffer_size(self):
        return 0

    def write(self, data):
        self.written += data
        self.room -= len(data)
        if self.room <= 0:
            self.end.pause_writing()

    def abort(self):
        self.aborted = True


class Loop:
    """Does at once what the event loop does soon; connections are made by the test."""

    def __init__(self):
        self.now, self.attempts = 0.0, 0
        self.writer = lambda: None

    def add_writer(self, socket, action):
        self.writer = action

    def remove_writer(self, socket):
        self.writer = lambda: None

    def time(self):
        return self.now

    def call_soon_threadsafe(self, action):
        action()

    def create_task(self, attempt):
        attempt.close()
        self.attempts += 1
        return object()


def make(lane=incoming.BULK, tls=True):
    """Return an end that sends all in the event loop, as with TLS, unless told otherwise."""
    return outgoing.Outgoing(Loop(), lambda: "127.0.0.1:1", lane, "token", object() if tls else None)


def connect(end, kind=Transport):
    """Connect and greet; return the transport, from which the greeting is removed."""
    end._connecting = None
    end.connection_made(made := kind(end))
    challenged = greeting.challenge()
    end.data_received(challenged[:5])
    end.data_received(challenged[5:])
    welcome, _ = greeting.check("token", challenged, bytes(made.written))
    made.written.clear()
    end.data_received(welcome)
    return made


def big(number):
    lease = messages.Lease(0, 0, 0, 0, 4)
    return encoding.encode(
        messages.Push(0, 1, 2, number, 4, 5, lease, 4.0, 4.0, True, 1.0, (np.zeros(200_000, np.float32),))
    )


def size(*encoded):
    return sum(each.num_bytes for each in encoded)


def test_messages_wait_for_the_greeting_and_leave_in_order():
    end = make()
    end.put(big(1))
    end.put(big(2))
    assert end._loop.attempts == 1
    made = connect(end)
    assert made.written == b"".join(block for n in (1, 2) for block in big(n))
    assert not end.is_idle()  # nothing was handled yet


def test_a_large_message_is_not_sent_twice_while_it_travels():
    end = make()
    made = connect(end)
    for _ in range(3):
        end.put(big(1))
    assert len(made.written) == size(big(1))
    end.data_received(incoming.ACK.pack(1, 0)[:3])
    end.put(big(1))
    assert len(made.written) == size(big(1))
    end.data_received(incoming.ACK.pack(1, 0)[3:])
    assert end.is_idle()
    end.put(big(1))
    assert len(made.written) == 2 * size(big(1))


def test_what_a_failed_connection_carried_may_be_sent_again_and_what_waited_is_sent():
    end = make()
    made = connect(end)
    made.room = 1000
    end.put(big(1))
    end.put(big(2))
    assert len(made.written) < size(big(1))
    end.connection_lost(None)
    assert end._loop.attempts == 1
    made = connect(end)
    assert made.written == b"".join(big(2))
    end.put(big(1))
    assert made.written == b"".join([*big(2), *big(1)])


def test_a_full_connection_is_written_to_again_when_it_has_room():
    end = make()
    made = connect(end)
    made.room = 1000
    end.put(big(1))
    before = len(made.written)
    made.room = 1 << 30
    end.resume_writing()
    assert before < len(made.written) == size(big(1))


def test_small_messages_that_wait_leave_together():
    end = make(incoming.CONTROL)
    ask = [encoding.encode(messages.Ask(0, 1, n)) for n in range(3)]
    for each in (*ask, ask[0]):
        end.put(each)
    made = connect(end)
    assert made.written == b"".join(block for each in ask for block in each)
    assert end.is_idle()
    end.put(ask[0])
    assert len(made.written) == size(*ask, ask[0])


def test_the_queue_of_a_peer_is_limited_and_one_message_of_any_size_fits(monkeypatch):
    monkeypatch.setattr(outbox.Outbox.__init__, "__kwdefaults__", {"most_bytes": 1000})
    end = make()
    for number in range(3):
        end.put(big(number))
    assert len(connect(end).written) == size(big(0))


def test_a_listener_that_does_not_know_the_token_gets_nothing():
    end = make()
    end.put(big(1))
    end._connecting = None
    end.connection_made(made := Transport(end))
    end.data_received(greeting.challenge())
    end.data_received(bytes(greeting.WELCOME_BYTES))
    assert made.aborted
    assert len(made.written) == greeting.ANSWER_BYTES
    end.connection_lost(None)
    assert end.is_idle()


def test_a_connection_on_which_nothing_moves_is_given_up():
    end = make()
    made = connect(end)
    end.look(1e6)
    assert not made.aborted
    made.room = 1000
    end.put(big(1))
    end.look(1e6 + 1)
    end.look(1e6 + 2)
    assert not made.aborted
    end.look(1e6 + incoming.IDLE_SECONDS + 3)
    assert made.aborted
    silent = make()
    silent.connection_made(made := Transport(silent))
    silent.look(incoming.GREETING_SECONDS + 1)
    assert made.aborted


def test_a_peer_that_cannot_be_reached_costs_the_messages_that_wait():
    async def attempt():
        end = outgoing.Outgoing(asyncio.get_running_loop(), lambda: "127.0.0.1:1", incoming.BULK, "", None)
        end.put(big(1))
        while not end.is_idle():
            await asyncio.sleep(0.001)
        return end

    assert not asyncio.run(attempt())._outbox.has_waiting()


@pytest.mark.parametrize("address", ["[::1]:70", "::1:70"])
def test_an_address_of_ip_version_6_is_understood(address):
    end = outgoing.Outgoing(Loop(), lambda: address, incoming.BULK, "", None)
    assert (end._host, end._port) == ("::1", 70)


def test_a_message_that_waits_without_an_attempt_to_connect_is_sent_when_it_is_repeated():
    end = make()
    end._connecting = object()  # an attempt that has failed, but not ended
    end.put(big(1))
    end._connecting = None
    end.put(big(1))
    assert end._loop.attempts == 1
    assert len(connect(end).written) == size(big(1))


def small(number):
    return encoding.encode(messages.DoneAck(0, 1, number))


class SocketTransport(Transport):
    """A connection whose socket a test holds the other end of."""

    def __init__(self, end):
        super().__init__(end)
        self.mine, self.peer = socket.socketpair()
        self.mine.setblocking(False)

    def fileno(self):
        return self.mine.fileno()

    def close(self):
        self.end.connection_lost(None)
        self.mine.close()
        self.peer.close()


@pytest.fixture
def direct():
    end = make(incoming.CONTROL, tls=False)
    made = connect(end, SocketTransport)
    yield end, made
    made.close()


def test_a_message_leaves_in_the_thread_that_sends_it(direct):
    end, made = direct
    end._loop.call_soon_threadsafe = None  # the event loop is not woken
    end.put(small(1))
    assert made.peer.recv(1000) == b"".join(small(1))
    assert made.written == b""
    assert end.is_idle()


def test_what_the_socket_does_not_take_at_once_is_sent_by_the_event_loop_in_order(direct):
    end, made = direct
    sent, number = b"", 0
    while not end._left:
        number += 1
        sent += b"".join(small(number))
        end.put(small(number))
    made.peer.setblocking(False)
    arrived = made.peer.recv(1 << 20)
    end.put(small(0))  # would be taken at once now, and overtake
    sent += b"".join(small(0))
    while not end.is_idle():
        arrived += made.peer.recv(1 << 20)
        end._loop.writer()
    while len(arrived) < len(sent):
        arrived += made.peer.recv(1 << 20)
    assert arrived == sent
    assert made.written == b""


def test_a_connection_that_ended_leaves_no_socket_open(direct):
    end, _ = direct
    other = end._socket
    end.connection_lost(None)
    assert other.fileno() == -1
    end.put(small(1))
    assert end._loop.attempts == 1


def test_a_connection_to_a_peer_that_has_moved_is_given_up():
    places = ["127.0.0.1:1"]
    end = outgoing.Outgoing(Loop(), lambda: places[0], incoming.CONTROL, "token", object())
    made = connect(end)
    end.look(0.0)
    assert not made.aborted
    places[0] = "127.0.0.2:5"
    end.look(0.1)
    assert made.aborted
    end._find()
    assert (end._host, end._port) == ("127.0.0.2", 5)
