"""Messages between real endpoints: delivered whole, refused from strangers, no more bytes than there is room for."""

import contextlib
import dataclasses
import pathlib
import queue
import socket

import numpy as np
import pytest

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.wire import greeting, outgoing, security, streams

CERTIFICATES = pathlib.Path(__file__).parents[1] / "certificates"
HELLO = messages.Register("worker/0", 1)
PEM = [(CERTIFICATES / name).read_bytes() for name in ("node.pem", "key.pem", "root.pem")]
TLS = security.Security("", *PEM)
OPEN = security.Security()
SECRET = security.Security(token="secret")


@contextlib.contextmanager
def listening(security=OPEN, receive=None):
    heard = queue.Queue()

    def take(message, handled):
        heard.put(message)
        handled()

    end = streams.Wire(listen="127.0.0.1:0", peers={}, receive=receive or take, security=security)
    try:
        yield end, heard
    finally:
        end.close()


@contextlib.contextmanager
def speaking(to, security=OPEN):
    with listening(security) as (end, _):
        end.peers["peer"] = f"127.0.0.1:{to.port}"
        yield end


def transfer(size):
    state = messages.ShardState(0, 0, 0, (np.arange(size, dtype=np.float32),), (), (), (), 0, (), (), (), None)
    return messages.Transfer(0, 1, 2, state)


@pytest.mark.parametrize("security", [OPEN, SECRET, TLS], ids=["open", "token", "tls"])
def test_a_message_of_many_blocks_arrives_whole_and_in_order(security):
    with listening(security) as (end, heard), speaking(end, security) as peer:
        peer.send("peer", HELLO)
        peer.send("peer", transfer(3_000_000))
        assert heard.get(timeout=200) == HELLO
        assert np.array_equal(heard.get(timeout=200).state.params[0], transfer(3_000_000).state.params[0])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(SECRET, OPEN), (SECRET, security.Security(token="guess")), (TLS, OPEN)],
    ids=["no token", "another token", "no certificate"],
)
def test_a_stranger_is_not_heard(ours, theirs, monkeypatch):
    with listening(ours) as (end, heard), speaking(end, theirs) as stranger, speaking(end, ours) as friend:
        with monkeypatch.context() as patch:
            patch.setattr(outgoing, "GREETING_SECONDS", 0.2)  # a listener with TLS does not speak first
            stranger.send("peer", messages.Register("stranger", 1))
            stranger.flush(30)
        friend.send("peer", HELLO)
        assert heard.get(timeout=200) == HELLO
        assert heard.empty()


def test_an_address_others_can_reach_is_refused_without_security():
    with pytest.raises(ValueError, match=r"got 10\.0\.0\.1 without any.*JAXDIST_PS_TOKEN"):
        streams.Wire(listen="10.0.0.1:0", peers={}, receive=lambda message: None)
    with pytest.raises(ValueError, match="all three"):
        security.Security(certificate=b"x").check("127.0.0.1")
    for enough in (SECRET, TLS):
        enough.check("10.0.0.1")


def test_security_is_read_from_the_environment():
    names = dict(zip((security.CERTIFICATE, security.KEY, security.ROOT), ("node.pem", "key.pem", "root.pem")))
    environment = {name: str(CERTIFICATES / file) for name, file in names.items()}
    assert security.Security.read(environment) == TLS
    assert security.Security.read({security.TOKEN: "secret"}) == SECRET
    assert security.Security.read({}) == OPEN


@pytest.fixture(scope="module")
def endpoint():
    with listening() as (end, heard):
        yield end, heard


def test_a_large_message_that_waits_is_not_sent_again_and_holds_up_no_small_one():
    heard, large = queue.Queue(), transfer(1_000_000)

    with listening(receive=lambda *arrived: heard.put(arrived)) as (end, _), speaking(end) as peer:
        peer.send("peer", large)
        message, handled = heard.get(timeout=200)
        assert message.index == large.index
        for _ in range(5):
            peer.send("peer", large)
        peer.send("peer", dataclasses.replace(large, index=7))
        peer.send("peer", HELLO)
        others = [heard.get(timeout=200) for _ in range(2)]
        assert {type(message) for message, _ in others} == {messages.Transfer, messages.Register}
        for done in (handled, *(each[1] for each in others)):
            done()
        peer.flush(30)
    assert heard.empty()


def test_a_peer_that_starts_again_is_reached_again():
    with listening() as (first, heard), speaking(first) as peer:
        peer.send("peer", HELLO)
        assert heard.get(timeout=200) == HELLO
        first.close()
        heard = queue.Queue()
        again = streams.Wire(
            listen=f"127.0.0.1:{first.port}", peers={}, receive=lambda message, handled: heard.put(message)
        )
        try:
            # What was sent before the failure was noticed is lost, as the protocol expects.
            for number in range(1000):
                peer.send("peer", messages.Register("worker/0", number))
                with contextlib.suppress(queue.Empty):
                    assert heard.get(timeout=0.05).name == "worker/0"
                    break
            else:
                pytest.fail("no message arrived")
        finally:
            again.close()


def test_connections_that_say_nothing_are_closed_when_there_are_many(endpoint):
    end, heard = endpoint
    with contextlib.ExitStack() as stack:
        strangers = []
        for _ in range(streams.MOST_STRANGERS + 20):
            stranger = stack.enter_context(socket.create_connection(("127.0.0.1", end.port)))
            stranger.settimeout(30)
            assert stranger.recv(100)  # the challenge
            strangers.append(stranger)
        assert strangers[0].recv(100) == b""
        with speaking(end) as peer:
            peer.send("peer", HELLO)
            assert heard.get(timeout=200) == HELLO


def test_a_listener_that_is_a_stranger_is_sent_no_message_and_no_token():
    with socket.create_server(("127.0.0.1", 0)) as stranger, listening(SECRET) as (end, _):
        end.peers["peer"] = f"127.0.0.1:{stranger.getsockname()[1]}"
        end.send("peer", HELLO)
        connection, _ = stranger.accept()
        with connection:
            connection.sendall(greeting.challenge() + bytes(greeting.WELCOME_BYTES))
            said = b""
            with contextlib.suppress(ConnectionResetError):
                while data := connection.recv(1000):
                    said += data
    assert len(said) == greeting.ANSWER_BYTES
    assert b"secret" not in said


def test_random_bytes_on_the_port_disturb_nobody(endpoint):
    end, heard = endpoint
    for seed in range(3):
        with socket.create_connection(("127.0.0.1", end.port)) as stranger:
            stranger.sendall(np.random.default_rng(seed).bytes(10_000))
    with speaking(end) as peer:
        peer.send("peer", HELLO)
        assert heard.get(timeout=200) == HELLO
