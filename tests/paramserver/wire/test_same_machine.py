"""Processes of one machine find each other's Unix socket; all others, and those with TLS, talk by TCP."""

import queue
import socket
import sys

import pytest

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.wire import same_machine, streams

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Unix sockets without files are Linux's.")


@pytest.mark.parametrize(
    ("host", "port", "there"), [("127.0.0.1", 80, True), ("::1", 80, True), ("10.0.0.1", 80, False), ("", 0, False)]
)
def test_only_addresses_of_this_machine_have_one(host, port, there):
    assert (same_machine.name_of(host, port) is not None) == there


def listening(port=0, host="127.0.0.1"):
    heard = queue.Queue()
    wire = streams.Wire(
        listen=f"{host}:{port}", peers={}, receive=lambda message, handled: (handled(), heard.put(message))
    )
    return wire, heard


def test_a_message_takes_it_and_tcp_where_there_is_none(monkeypatch):
    (end, heard), (first, _), (second, _) = listening(), listening(), listening()
    try:
        first.peers["peer"] = second.peers["peer"] = f"127.0.0.1:{end.port}"
        first.send("peer", messages.Register("worker/0", 1))
        assert heard.get(timeout=200).name == "worker/0"
        monkeypatch.setattr(same_machine, "name_of", lambda host, port: "\0jaxdist-0")
        second.send("peer", messages.Register("worker/1", 1))
        assert heard.get(timeout=200).name == "worker/1"
        families = {link._transport.get_extra_info("socket").family for link in end._incoming}
        assert families == {socket.AF_UNIX, socket.AF_INET}
    finally:
        for wire in (first, second, end):
            wire.close()


def test_a_name_that_another_process_has_taken_is_like_a_port_that_is_in_use():
    end, _ = listening()
    end.close()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(same_machine.name_of("127.0.0.1", end.port))
        with pytest.raises(OSError, match="in use"):
            listening(end.port)
    again, _ = listening(end.port)
    again.close()


def test_the_same_port_of_another_loopback_address_is_another_socket():
    first, _ = listening()
    try:
        second, _ = listening(first.port, "127.0.0.2")
        second.close()
    finally:
        first.close()
