"""Real processes that cannot connect: each prints one message, soon, and leaves nothing behind."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import pytest

from jaxdist.errors import UserError
from jaxdist.launch.joining import coordinator as meeting
from jaxdist.launch.joining import places, same_on_all
from jaxdist.launch.supervising import local_job

EXPERIMENT = pathlib.Path(__file__).parents[2] / "tiny_experiment.py"


CERTIFICATES = pathlib.Path(__file__).parents[2] / "paramserver" / "certificates"
WITH_CERTIFICATE = {
    "JAX_MTLS_CERT_FILE": str(CERTIFICATES / "node.pem"),
    "JAX_MTLS_KEY_FILE": str(CERTIFICATES / "key.pem"),
    "JAX_MTLS_CA_FILE": str(CERTIFICATES / "root.pem"),
}


def start(port, number, run_dir, *arguments, seconds=150, environment=None, before=()):
    place = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"{local_job.LOOPBACK}:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
        meeting.CONNECT_SECONDS: str(seconds),
    }
    command = [sys.executable, "-m", "jaxdist.cli", "train", str(EXPERIMENT), "--run-dir", str(run_dir), *arguments]
    return subprocess.Popen(
        [*before, *command],
        env={**os.environ, **place, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ends(process):
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    return process.returncode, output


def free_port():
    [port] = local_job.quiet_ports(1)
    return port


def test_processes_that_run_different_settings_are_told_so_and_leave_no_run(tmp_path):
    port = free_port()
    both = [
        start(port, 0, tmp_path / "run"),
        start(port, 1, tmp_path / "run", "--set", "optimizer.learning_rate=0.7"),
    ]
    results = [ends(process) for process in both]
    for status, output in results:
        assert status == 2, output
        assert "setting optimizer.learning_rate: process 1" in output
        assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.soak
def test_processes_whose_code_is_for_other_cpus_are_told_so_and_leave_no_run(tmp_path):
    """SSE4.2 and AVX2 give other bits: here by a flag of XLA on one of two processes."""
    port = free_port()
    both = [
        start(port, number, tmp_path / "run", environment={"XLA_FLAGS": f"--xla_cpu_max_isa={name}"})
        for number, name in enumerate(("AVX2", "SSE4_2"))
    ]
    for status, output in map(ends, both):
        assert status == 2, output
        assert "XLA_FLAGS: process 1" in output
        assert "--xla_cpu_max_isa=SSE4_2" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.root
def test_processes_on_other_cpus_are_told_so_and_leave_no_run(tmp_path):
    """One process has a /proc/cpuinfo without AVX2, in a mount namespace of its own."""
    real, other = pathlib.Path("/proc/cpuinfo").read_text(), tmp_path / "cpuinfo"
    other.write_text(re.sub(r" (avx\w*|fma)\b", "", real))
    assert same_on_all.instructions(real) != same_on_all.instructions(other.read_text()), "this CPU has AVX2"
    port = free_port()
    moved = ["unshare", "-m", "sh", "-c", f'mount --bind {other} /proc/cpuinfo && exec "$@"', "sh"]
    both = [start(port, 0, tmp_path / "run"), start(port, 1, tmp_path / "run", before=moved)]
    for status, output in map(ends, both):
        assert status == 2, output
        assert "CPU instructions: process 1" in output
        assert "SSE4.2" in output
    assert not (tmp_path / "run").exists()


def test_a_coordinator_that_is_not_there_is_named(tmp_path):
    port = free_port()
    status, output = ends(start(port, 1, tmp_path / "run", seconds=1))
    assert status == 75
    assert f"could not reach the coordinator at 127.0.0.1:{port}" in output
    assert "Traceback" not in output


def test_processes_that_do_not_come_are_not_waited_for_forever(tmp_path):
    status, output = ends(start(free_port(), 0, tmp_path / "run", seconds=1))
    assert status == 75
    assert "Not all 2 processes connected" in output
    assert "Traceback" not in output


def test_a_port_that_is_taken_is_named_even_where_it_could_be_shared():
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((local_job.LOOPBACK, 0))
        other.listen()
        address = "{}:{}".format(*other.getsockname())
        with pytest.raises(UserError, match=rf"listen at {address}: Address already in use"):
            meeting.check_free(address)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(UserError, match="start process 0 on the host that has this address"):
        meeting.check_free("192.0.2.1:80")


def test_collectives_listen_where_the_coordinator_does():
    assert meeting.own_address(f"{local_job.LOOPBACK}:1") == local_job.LOOPBACK
    assert meeting.own_address("[::1]:1") == "::1"


def test_tls_is_refused_where_jax_has_none(monkeypatch):
    monkeypatch.setenv("JAX_MTLS_CERT_FILE", "cert.pem")
    if hasattr(jax.config, "jax_mtls_cert_file"):
        meeting.check_tls()
    else:
        with pytest.raises(UserError, match="JAX_MTLS_CERT_FILE asks for mutual TLS"):
            meeting.check_tls()


def test_with_tls_processes_with_a_certificate_meet(tmp_path):
    port = free_port()
    both = [start(port, number, tmp_path / "run", environment=WITH_CERTIFICATE) for number in (0, 1)]
    for status, output in [ends(process) for process in both]:
        if hasattr(jax.config, "jax_mtls_cert_file"):
            assert status == 0, output
        else:
            assert status == 2, output
            assert "asks for mutual TLS" in output


@pytest.mark.slow
def test_with_tls_a_process_without_a_certificate_is_turned_away(tmp_path):
    port = free_port()
    coordinator = start(port, 0, tmp_path / "run", seconds=8, environment=WITH_CERTIFICATE)
    stranger = start(port, 1, tmp_path / "run", seconds=8)
    (status, output), (strange_status, strange_output) = ends(coordinator), ends(stranger)
    has_tls = hasattr(jax.config, "jax_mtls_cert_file")
    assert status == (75 if has_tls else 2), output
    assert strange_status == 75, strange_output
    # With TLS there is a coordinator, which does not answer; without it there is none.
    assert ("Not all 2 processes connected" if has_tls else "could not reach the coordinator") in strange_output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("engine", "coordinator", "aborts"),
    [(places.LAUNCHER, "127.0.0.1:99", False), (places.LAUNCHER, "10.0.0.1:99", True), ("SLURM", "127.0.0.1:99", True)],
)
def test_jax_aborts_no_job_that_has_a_supervisor_on_its_machine_because_a_clock_is_set(
    monkeypatch, engine, coordinator, aborts
):
    """Its heartbeats are timed by the clock of the machine: two hours forward, and all processes count as dead."""
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: given.update(arguments))
    for name in ("await_coordinator", "own_address"):
        monkeypatch.setattr(meeting, name, lambda *_: "127.0.0.1")
    monkeypatch.setattr(meeting.jax_private, "use_gloo_at", lambda _: None)
    place = places.Place(
        engine=engine, coordinator=coordinator, num_processes=2, process_id=1, bind_address=coordinator
    )
    meeting.join(place)
    assert (given["heartbeat_timeout_seconds"] < 7200) == aborts
