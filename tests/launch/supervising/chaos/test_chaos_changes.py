"""When processes join and leave in a chaos run, and the commands that make them."""

import sys

import pytest

from jaxdist.errors import UserError
from jaxdist.launch.supervising.chaos import chaos_changes


def test_a_change_that_is_not_possible_waits_for_the_next():
    assert chaos_changes.sizes(["leave", "leave", "join", "join"], 2) == [
        ("leave", 1), ("join", 2), ("leave", 1), ("join", 2),
    ]  # fmt: skip
    assert chaos_changes.sizes(["join", "join", "leave"], 2) == [("join", 4), ("leave", 2), ("join", 4)]
    assert chaos_changes.sizes([], 3) == []


@pytest.mark.parametrize(
    ("kinds", "processes"), [(["join"] * 3, 2), (["leave"] * 3, 2), (["leave"], 1), (["leave"], 3)]
)
def test_too_many_of_a_kind_are_refused(kinds, processes):
    with pytest.raises(UserError, match="may differ only by a few"):
        chaos_changes.sizes(kinds, processes)


def test_the_newest_command_leaves_first_and_all_end(tmp_path, monkeypatch):
    wait = "import sys, time; print(sys.argv[1:], flush=True); time.sleep(600 if sys.argv[1] == 'join' else 0)"
    monkeypatch.setattr(chaos_changes, "_COMMAND", (sys.executable, "-c", wait))
    monkeypatch.setattr(chaos_changes, "_END_SECONDS", 0.01)
    run_dir = tmp_path / "run"
    with chaos_changes.Commands(run_dir, seed=0) as commands:
        is_told = commands.change(1, joins=False)  # of the supervisor's own
        while not is_told():
            pass
        assert commands.change(1, joins=True)()
        commands.change(2, joins=True)
        first, second = commands._joined
        commands.change(2, joins=False)
        assert second.wait(200) < 0
        assert first.poll() is None
    assert first.returncode is not None
    assert f"['leave', '{run_dir}', '--processes', '1']" in (tmp_path / "joined.txt").read_text()
