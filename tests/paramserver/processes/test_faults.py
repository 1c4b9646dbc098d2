"""Faults at labelled points of the protocol, with real processes: the bits are the same after every death and loss.

Each run is compared with an undisturbed one. Lines in the syntax of `faults` say which point is struck, and how.
"""

import itertools
import json
import signal
import socket
import threading
import time

import numpy as np
import proxy
import pytest
import tiny_experiment
from test_processes import (  # noqa: F401 (calm is a fixture)
    REPLICATED,
    Mischief,
    calm,
    disturbed,
    held,
    options,
    pid_of,
    signal_if_there,
    struck,
    train_held,
)

from jaxdist.paramserver.processes import faults
from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.run import start
from jaxdist.paramserver.wire import security, streams

pytestmark = [pytest.mark.timeout(600)]


@pytest.mark.soak
@pytest.mark.parametrize(
    "labels",
    [
        ("hear Grant", "hear Push", "do CommitRecord"),
        ("do Compute", "send CommitAck", "did CommitRecord"),
        ("send Push", "send Replicate", "send Commit"),
        ("send Done", "hear Commit", "send Grant"),
        ("hear Pulled", "send Staged", "do MembershipRecord"),
        ("send Pull", "send Pulled", "did MembershipRecord"),
    ],
)
def test_killed_at_a_labelled_point(tmp_path, monkeypatch, calm, labels):  # noqa: F811
    worker, server, scheduler = labels
    copy = "b" if server == "send Staged" else "a"
    count = 3 if "Membership" in scheduler else 25
    turn = 1 if worker == "send Pull" else 6  # a push asks for the next params itself
    made = struck(
        tmp_path,
        monkeypatch,
        f"worker/1 {worker} {turn} kill",
        f"scheduler {scheduler} {count} kill",
        f"server/0/{copy} {server} 25 kill",
    )
    assert made.params_sha256 == calm.params_sha256
    assert made.examples_seen == calm.examples_seen


@pytest.mark.soak
@pytest.mark.parametrize("process", ["worker/1", "server/0/a", "scheduler"])
def test_stopped_for_twenty_seconds(tmp_path, monkeypatch, calm, process):  # noqa: F811
    label = {"worker/1": "do Compute", "server/0/a": "hear Commit", "scheduler": "did CommitRecord"}[process]

    def wake(mischief):
        marks = mischief.directory / "faults"
        while not (marks.exists() and any(marks.iterdir())):
            time.sleep(0.02)
        pid = pid_of(process, mischief.directory)
        threading.Timer(20.0, lambda: signal_if_there(pid, signal.SIGCONT)).start()

    mischief = Mischief(tmp_path, [(0, wake)])
    mischief.start()
    # Slow steps, so that the run is still there when the sleeper wakes.
    made = struck(tmp_path, monkeypatch, f"{process} {label} 10 stop")
    assert mischief.done
    assert made.params_sha256 == calm.params_sha256


@pytest.mark.soak
def test_answers_lost_after_they_were_applied(tmp_path, monkeypatch, calm):  # noqa: F811
    kinds = ["Pulled", "CommitAck", "Replicated"]
    lines = [f"server/0/{'b' if kind == 'Replicated' else 'a'} send {kind} 9 lose" for kind in kinds]
    lines += ["server/0/b send Staged 9 lose", "scheduler send Grant 11 lose", "worker/0 send Push 13 repeat"]
    made = struck(tmp_path, monkeypatch, *lines)
    assert made.params_sha256 == calm.params_sha256
    assert made.extra["ps"]["duplicates_refused"] >= 1
    assert made.restarts == 0


@pytest.mark.soak
def test_a_tenth_of_all_messages_lost_and_a_tenth_repeated(tmp_path, monkeypatch, calm):  # noqa: F811
    made = struck(tmp_path, monkeypatch, "* send * 0.1 lose", "* send * 0.1 repeat")
    assert made.params_sha256 == calm.params_sha256
    assert made.examples_seen == calm.examples_seen


@pytest.mark.soak
def test_a_network_that_loses_a_tenth_and_delivers_a_tenth_twice(tmp_path, monkeypatch, calm):  # noqa: F811
    with proxy.between_all(monkeypatch, lost=0.1, repeated=0.1) as proxies:
        made = start.train(options(tmp_path, **REPLICATED))
    assert (made.params_sha256, made.examples_seen) == (calm.params_sha256, calm.examples_seen)
    assert set(proxies) == {"observer", "scheduler", "server/0/a", "server/0/b", "worker/0", "worker/1"}
    passed, lost, repeated = (
        sum(getattr(each, name) for each in proxies.values()) for name in ("passed", "lost", "repeated")
    )
    assert passed > 600
    assert 0.05 < lost / passed < 0.15
    assert 0.05 < repeated / passed < 0.15
    assert made.extra["ps"]["duplicates_refused"] > 0


@pytest.mark.soak
def test_one_worker_five_times_slower(tmp_path, monkeypatch, calm):  # noqa: F811
    over = threading.Event()

    def slow_down(mischief):
        pid = pid_of("worker/1", mischief.directory)
        mischief.go.touch()
        for number in itertools.cycle((signal.SIGSTOP, signal.SIGCONT)):
            with_it = over.wait(0.2 if number == signal.SIGCONT else 0.05)
            signal_if_there(pid, signal.SIGCONT if with_it else number)
            if with_it:
                return

    mischief = held(tmp_path, monkeypatch, [(3, slow_down)])
    made = train_held(tmp_path, steps=60, workers=2, servers=1)
    over.set()
    mischief.join()
    assert made.params_sha256 == calm.params_sha256


@pytest.mark.soak
def test_no_room_on_the_disk_for_a_snapshot(tmp_path, monkeypatch, calm):  # noqa: F811
    chosen = {"durability": "snapshot", "snapshot_every": 10}
    made = struck(tmp_path, monkeypatch, "server/0/a do Write 2 full", **chosen)
    assert made.params_sha256 == calm.params_sha256
    assert "The saved cut before it stays in use" in (tmp_path / "ps" / "logs" / "scheduler.log").read_text()
    written = [path.parent.name for path in (tmp_path / "ps").glob("*/manifest")]
    assert [name.startswith("0000000010-") for name in written] == [True], written


@pytest.mark.soak
def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    made = start.train(options(tmp_path, steps=60, workers=2, assignments=["optimizer.learning_rate=1e38"]))
    assert made.end_reason == "nonfinite"


@pytest.mark.soak
def test_noise_strangers_and_wrong_dtypes_on_the_ports(tmp_path, monkeypatch, calm):  # noqa: F811
    monkeypatch.setattr(security, "new_token", lambda: "known")

    def disturb(mischief):
        spec = json.loads((mischief.directory / "spec.json").read_text())
        peers = spec["peers"]
        for name, address in peers.items():
            host, port = address.split(":")
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(np.random.default_rng(len(name)).bytes(5000))
        for token in ("known", "guessed"):
            shown = security.Security(token=token).for_attempt(spec["attempt"])
            end = streams.Wire(listen="127.0.0.1:0", peers=peers, receive=lambda *message: None, security=shown)
            lease = messages.Lease(0, 0, 0, 0, 1)
            piece = np.zeros(3, np.float64)
            end.send("server/0/a", messages.Push(0, 0, 1, 1 << 40, 0, 0, lease, 1.0, 1.0, True, 0.0, (piece,) * 8))
            end.flush(10.0)
            end.close()

    made = disturbed(tmp_path, monkeypatch, [(2, disturb)], steps=60, workers=2, servers=1)
    assert made.params_sha256 == calm.params_sha256
    assert made.extra["ps"]["refused"] == 1, "the push with the token is refused by name, the other is not even read"
    assert made.examples_seen == 15 * tiny_experiment.NUM_TRAIN


@pytest.mark.parametrize("line", ["worker/0 send Push 3", "worker/0 hear Push 3 lose", "worker/0 send Push 3 explode"])
def test_a_line_that_is_no_fault_says_so(line):
    with pytest.raises(ValueError, match="got 'worker/0"):
        faults.Fault.parse(line)
