"""Boot numbers grow with every start of a process, whatever the clock says."""

import dataclasses
import time

import pytest

from jaxdist.paramserver.processes import run_folder
from jaxdist.paramserver.processes.run_folder import last_boot, next_boot


def test_boot_numbers_grow_though_the_clock_is_set_back(tmp_path, monkeypatch):
    first = next_boot(tmp_path, "server/0/a")
    died = last_boot(tmp_path, "server/0/a")
    monkeypatch.setattr(time, "time_ns", lambda: 1_000)
    second = next_boot(tmp_path, "server/0/a")
    assert second > first + 1000  # a process counts its own rejoins upwards
    assert first + 1000 < died < second  # a death that is told concerns all rejoins of that start, and no later start
    assert last_boot(tmp_path, "worker/0") == 0
    assert next_boot(tmp_path, "worker/0") == 1_000_000


def test_setting_the_clock_moves_no_time_of_a_run(tmp_path, monkeypatch):
    spec = run_folder.Spec("a", "x.py", [], {}, {}, "", "", 1, "whole", clock=run_folder.clock_of_machine())
    spec.write(tmp_path / run_folder.SPEC_NAME)
    before = run_folder.Spec.read(tmp_path / run_folder.SPEC_NAME).make_clock()
    assert before() == pytest.approx(time.time(), abs=5.0)
    moved = time.time() - 7200.0
    monkeypatch.setattr(time, "time", lambda: moved)
    restarted = run_folder.Spec.read(tmp_path / run_folder.SPEC_NAME)
    assert restarted.make_clock()() == pytest.approx(before(), abs=5.0)
    elsewhere = dataclasses.replace(restarted, clock=("another machine", 0.0))
    assert elsewhere.make_clock()() == pytest.approx(moved, abs=5.0)


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_an_earlier_attempt_left_is_removed_whatever_it_has_become(tmp_path, is_folder):
    """A log of the scheduler that is a folder ended a resume with the number of an error."""
    names = [getattr(run_folder, name) for name in dir(run_folder) if name.endswith("_NAME")]
    names.remove(run_folder.DIRECTORY_NAME)
    for name in names:
        if is_folder:
            (tmp_path / name).mkdir()
            (tmp_path / name / "old").touch()
        else:
            (tmp_path / name).write_text("old")
    run_folder.remove_earlier(tmp_path)
    assert list(tmp_path.iterdir()) == []
