"""Where the processes of a run listen, also of those that come or move later."""

import socket

from jaxdist.paramserver.processes import peer_addresses


def test_processes_that_come_or_move_later_are_found_where_they_are(tmp_path):
    given = {"server/0/a": "10.0.0.2:7801", "worker/0": "10.0.0.2:7802"}
    known = peer_addresses.Addresses(given, tmp_path)
    assert dict(known) == given
    assert "worker/7" not in known
    for number in range(5):  # within one tick of the clock that stamps the folder
        peer_addresses.announce(tmp_path, "worker/7", f"10.0.0.3:{number}")
        peer_addresses.announce(tmp_path, "server/0/a", f"10.0.0.4:{number}")
        assert (known["worker/7"], known["server/0/a"]) == (f"10.0.0.3:{number}", f"10.0.0.4:{number}")
    assert dict(known) == {"server/0/a": "10.0.0.4:4", "worker/0": "10.0.0.2:7802", "worker/7": "10.0.0.3:4"}
    assert len(known) == 3


def test_free_addresses_differ_and_are_of_this_machine():
    found = peer_addresses.free_addresses("127.0.0.2", 3)
    assert len(set(found)) == 3
    for each in found:
        host, _, port = each.rpartition(":")
        socket.create_server((host, int(port))).close()
