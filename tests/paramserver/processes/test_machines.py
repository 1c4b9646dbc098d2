"""Several machines: every process has one place, and the address of a machine needs a secret."""

import json
import os
import re
import socket

import pytest
import run_records
import tiny_experiment

from jaxdist.cli import main
from jaxdist.launch.supervising import local_job
from jaxdist.paramserver.processes import admission, machines, run_folder
from jaxdist.paramserver.protocol.settings import OBSERVER
from jaxdist.paramserver.wire import security
from jaxdist.rundir import record

NAMES = ["scheduler", "server/0/a", "server/0/b", "server/1/a", "server/1/b", "worker/0", "worker/1", "worker/2"]


def test_the_copies_of_a_shard_and_the_workers_go_round_the_hosts():
    peers = machines.assign(NAMES, ["10.0.0.1", "10.0.0.2"], 7800)
    peers[OBSERVER] = "10.0.0.1:7900"
    assert machines.names_at(peers, "10.0.0.1") == ["scheduler", "server/0/a", "server/1/a", "worker/0", "worker/2"]
    assert machines.names_at(peers, "10.0.0.2") == ["server/0/b", "server/1/b", "worker/1"]
    assert len(set(peers.values())) == len(peers)


@pytest.mark.parametrize("hosts", [["a", "a"], ["a", "b", "c", "d", "e"]])
def test_a_host_with_nothing_to_do_is_refused(hosts):
    with pytest.raises(ValueError, match=r"ps\.hosts must name"):
        machines.check(hosts, NAMES)
    machines.check(["a", "b", "c", "d"], NAMES)


def test_another_machine_needs_a_secret_that_is_given(monkeypatch):
    monkeypatch.delenv(security.TOKEN, raising=False)
    assert machines.security_of([]).token != machines.security_of(["127.0.0.1"]).token
    with pytest.raises(ValueError, match=r"got 10\.0\.0\.2 without any"):
        machines.security_of(["127.0.0.1", "10.0.0.2"])
    monkeypatch.setenv(security.TOKEN, "secret")
    assert machines.security_of(["10.0.0.2"]).token == "secret"


@pytest.fixture
def door(tmp_path):
    """The door of a run whose worker 0 is to run on 127.0.0.2."""
    spec = run_folder.Spec(
        attempt="a",
        experiment=tiny_experiment.__file__,
        assignments=[],
        settings={},
        peers={"worker/0": "127.0.0.2:1", "scheduler": "127.0.0.1:1", OBSERVER: "127.0.0.1:2"},
        directory=str(tmp_path),
        resume="",
        devices=1,
        kind="elementwise",
        door=(f"jaxdist-test-{security.new_token()}", f"127.0.0.1:{local_job.quiet_ports(1)[0]}"),
    )
    spec.write(tmp_path / run_folder.DIRECTORY_NAME / run_folder.SPEC_NAME)
    directory = tmp_path / run_folder.DIRECTORY_NAME
    opened = admission.Admission(spec, directory, security.Security.read(os.environ), first_worker=1)
    opened.open()
    yield opened
    opened.close()


@pytest.mark.parametrize(("reason", "status"), [("max_steps", 0), ("preempted", 0), (None, 75)])
def test_a_process_that_missed_the_end_is_no_reason_for_another_attempt(tmp_path, monkeypatch, door, reason, status):
    kept = []

    class DeafCrew(machines.LocalCrew):
        def start(self):
            (tmp_path / record.FILE_NAME).write_text(json.dumps(run_records.EMPTY | {"end_reason": reason}))
            door.guests[0].line.close()  # as if the machine that trains had ended without a word

        def look_after(self):
            return {}

        def close(self, *, orderly):
            kept.append(self.names)

    monkeypatch.setattr(machines, "LocalCrew", DeafCrew)
    assert machines.main([str(tmp_path), "127.0.0.2"]) == status
    assert kept == [["worker/0"]]


def test_a_machine_whose_processes_run_elsewhere_by_now_is_told(tmp_path, door, capsys):
    door.move("worker/0", "127.0.0.1:9")
    assert machines.main([str(tmp_path), "127.0.0.2"]) == 2
    assert "The processes of 127.0.0.2 run on other machines by now" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_before_anything_starts(tmp_path, capsys, monkeypatch):
    [first] = local_job.quiet_ports(1)
    run_dir, hosts = str(tmp_path / "run"), ["ps.hosts=127.0.0.1", f"ps.port={first}"]
    arguments = ["train", tiny_experiment.__file__, "--strategy", "parameter-server", "--run-dir", run_dir]
    with socket.create_server(("127.0.0.1", first + 1)):
        assert main.run([*arguments, "--set", *hosts]) == 2
    assert f"listen on 127.0.0.1:{first + 1}, and it cannot: Address already in use. Set" in capsys.readouterr().err
    monkeypatch.setenv(security.TOKEN, "secret")
    assert main.run([*arguments, "--set", "ps.hosts=192.0.2.1", f"ps.port={first}"]) == 2
    assert f"listen on 192.0.2.1:{first}, and it cannot: Cannot assign" in capsys.readouterr().err
    assert main.run([*arguments, "--set", "ps.hosts=no-such-host.invalid", f"ps.port={first}"]) == 2
    told = capsys.readouterr().err
    assert f"listen on no-such-host.invalid:{first}, and it cannot: " in told
    assert "Unknown error" not in told


def test_a_host_without_an_address_is_named_and_waited_for(capsys):
    """The name of a pod has an address once the pod has started."""
    machines.say_without_address(["127.0.0.1", "no-such-host.invalid"])
    assert re.fullmatch(r"jaxdist: no-such-host\.invalid has no address yet \(.+\)\. .*\n", capsys.readouterr().err)


def test_a_port_beyond_the_last_is_refused():
    with pytest.raises(
        ValueError, match=r"must listen on 127\.0\.0\.1:65536, and it cannot: The last port is 65535\. "
    ):
        machines.check_ports(["127.0.0.1:65536"])
