"""A process that plays a role: it listens where the Spec says, and its exit status says how its part ended."""

import logging
import pathlib
import socket

import pytest

from jaxdist.paramserver.processes import role, run_folder
from jaxdist.paramserver.processes.driver import Driver
from jaxdist.paramserver.processes.process_world import ProcessWorld
from jaxdist.paramserver.processes.reports import statistics_of
from jaxdist.paramserver.protocol import effects
from jaxdist.paramserver.wire.security import CERTIFICATE, KEY, ROOT


@pytest.fixture(autouse=True)
def handlers():
    """Give back the handlers of the root logger, which a process has for itself."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


class Ending:
    """A state machine whose part is over at once."""

    def __init__(self, end):
        self.end, self.counters = end, {"fenced": 3}

    def handle(self, message, now):
        return [], [self.end]


def play(tmp_path, end, address="127.0.0.1:0"):
    spec = run_folder.Spec("a", "x.py", [], {}, {"worker/0": address}, str(tmp_path), "", 1, "elementwise")
    spec.write(tmp_path / run_folder.SPEC_NAME)

    def make(name, spec):
        machine = Ending(end)
        statistics = statistics_of(name, spec, machine)
        world = ProcessWorld(tmp_path)
        return Driver(machine, world, observe=statistics.observe), world, statistics

    return role.main(["worker/0", str(tmp_path / run_folder.SPEC_NAME)], make)


@pytest.mark.parametrize(("end", "status"), [(effects.Exit(4, "max_steps"), 0), (effects.Exit(-1, "It broke."), 1)])
def test_the_exit_status_says_how_the_part_ended(tmp_path, capsys, end, status):
    assert play(tmp_path, end) == status
    assert ("worker/0: It broke." in capsys.readouterr().err) == bool(status)
    (counters,) = (tmp_path / run_folder.STATISTICS_NAME).iterdir()
    assert '"fenced": 3' in counters.read_text()


def test_a_port_that_is_taken_is_named(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert play(tmp_path, effects.Exit(4, "max_steps"), address) == 1
    assert address in capsys.readouterr().err


def test_certificates_that_others_would_refuse_end_a_process_as_a_mistake_of_the_user(tmp_path, capsys, monkeypatch):
    """It could never join: they expired while the run trained, for example, and this process was restarted."""
    folder = pathlib.Path(__file__).parents[1] / "certificates"
    for name, file in {CERTIFICATE: "node.pem", KEY: "key.pem", ROOT: "root.pem"}.items():
        monkeypatch.setenv(name, str(folder / file))
    assert play(tmp_path, effects.Exit(4, "max_steps")) == 0
    assert play(tmp_path, effects.Exit(4, "max_steps"), "127.0.0.2:0") == 2
    said = capsys.readouterr().err
    assert "127.0.0.2" in said
    assert CERTIFICATE in said
