"""Several machines: every process has one place, and the address of a machine needs a secret."""

import pytest

from jaxdist.paramserver import host, process, wire

NAMES = ["scheduler", "server/0/a", "server/0/b", "server/1/a", "server/1/b", "worker/0", "worker/1", "worker/2"]


def test_the_copies_of_a_shard_and_the_workers_go_round_the_hosts():
    peers = host.deal(NAMES, ["10.0.0.1", "10.0.0.2"], 7800)
    peers[process.OBSERVER] = "10.0.0.1:7900"
    assert host.names_at(peers, "10.0.0.1") == ["scheduler", "server/0/a", "server/1/a", "worker/0", "worker/2"]
    assert host.names_at(peers, "10.0.0.2") == ["server/0/b", "server/1/b", "worker/1"]
    assert len(set(peers.values())) == len(peers)


@pytest.mark.parametrize("hosts", [["a", "a"], ["a", "b", "c", "d", "e"]])
def test_a_host_with_nothing_to_do_is_refused(hosts):
    with pytest.raises(ValueError, match=r"each of ps\.hosts"):
        host.check(hosts, NAMES)
    host.check(["a", "b", "c", "d"], NAMES)


def test_another_machine_needs_a_secret_that_is_given(monkeypatch):
    monkeypatch.delenv(wire.TOKEN, raising=False)
    assert host.security_of([]).token != host.security_of(["127.0.0.1"]).token
    with pytest.raises(ValueError, match=r"10\.0\.0\.2 can be reached"):
        host.security_of(["127.0.0.1", "10.0.0.2"])
    monkeypatch.setenv(wire.TOKEN, "secret")
    assert host.security_of(["10.0.0.2"]).token == "secret"
