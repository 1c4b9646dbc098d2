"""Messages between real endpoints: delivered whole, refused from strangers, no more bytes than there is room for."""

import contextlib
import dataclasses
import pathlib
import queue
import socket
import threading

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.wire import codec, encoding, security, streams

CERTIFICATES = pathlib.Path(__file__).parents[1] / "certificates"
HELLO = messages.Register("worker/0", 1)
PEM = [(CERTIFICATES / name).read_bytes() for name in ("node.pem", "key.pem", "root.pem")]
TLS = security.Security("", *PEM)
OPEN = security.Security()
SECRET = security.Security(token="secret")


@contextlib.contextmanager
def listening(security=OPEN, receive=None):
    heard = queue.Queue()
    end = streams.Wire(listen="127.0.0.1:0", peers={}, receive=receive or heard.put, security=security)
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
    return messages.Transfer(0, 1, 2, 3, state)


@pytest.mark.parametrize("security", [OPEN, SECRET, TLS], ids=["open", "token", "tls"])
def test_a_message_of_many_blocks_arrives_whole_and_in_order(security):
    with listening(security) as (end, heard), speaking(end, security) as peer:
        peer.send("peer", HELLO)
        peer.send("peer", transfer(3_000_000))
        assert heard.get(timeout=30) == HELLO
        assert np.array_equal(heard.get(timeout=30).state.params[0], transfer(3_000_000).state.params[0])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(SECRET, OPEN), (SECRET, security.Security(token="guess")), (TLS, OPEN)],
    ids=["no token", "another token", "no certificate"],
)
def test_a_stranger_is_not_heard(ours, theirs):
    with listening(ours) as (end, heard), speaking(end, theirs) as stranger, speaking(end, ours) as friend:
        stranger.send("peer", messages.Register("stranger", 1))
        stranger.flush(30)
        friend.send("peer", HELLO)
        assert heard.get(timeout=30) == HELLO
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


def call(end, blocks):
    with grpc.insecure_channel(f"127.0.0.1:{end.port}") as channel:
        return channel.stream_unary(streams.METHOD)(iter(blocks), timeout=30)


@given(blocks=st.lists(st.binary(max_size=100), max_size=3))
@settings(max_examples=20, deadline=None)
def test_bytes_that_are_no_message_are_refused_by_name(endpoint, blocks):
    end, heard = endpoint
    with pytest.raises(grpc.RpcError) as refused:
        call(end, blocks)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert heard.empty()


def test_more_bytes_than_declared_are_refused(endpoint):
    end, _ = endpoint
    with pytest.raises(grpc.RpcError, match="longer than its declared"):
        call(end, [*encoding.encode(HELLO), b"more"])


def test_a_message_that_is_still_on_its_way_is_not_sent_again():
    held = threading.Event()
    heard = queue.Queue()

    def receive(message):
        heard.put(message)
        held.wait(30)

    big = transfer(1_000_000)
    with listening(receive=receive) as (end, _), speaking(end) as peer:
        peer.send("peer", big)
        assert heard.get(timeout=30).index == big.index  # and its call is not answered until `held`
        for _ in range(5):
            peer.send("peer", big)
            peer.send("peer", dataclasses.replace(big, index=7))
        held.set()
        assert heard.get(timeout=30).index == 7
        peer.flush(30)
    assert heard.empty()


def test_random_bytes_on_the_port_disturb_nobody(endpoint):
    end, heard = endpoint
    for seed in range(3):
        with socket.create_connection(("127.0.0.1", end.port)) as stranger:
            stranger.sendall(np.random.default_rng(seed).bytes(10_000))
    with speaking(end) as peer:
        peer.send("peer", HELLO)
        assert heard.get(timeout=30) == HELLO


def test_messages_wait_for_room_and_one_larger_than_all_of_it_goes_alone():
    budget = streams._Budget(10)
    no_room = pytest.raises(codec.EncodingError, match="No memory became free for a message of 1 bytes")
    with budget.held(6), budget.held(4), no_room, budget.held(1, seconds=0.01):
        pass
    with budget.held(1000), no_room, budget.held(1, seconds=0.01):
        pass
    with budget.held(10):
        pass
