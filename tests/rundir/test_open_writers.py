"""Writers that others add, and trackers: found by name, checked before the run, and never the end of a run."""

import importlib.metadata
import pathlib
import typing

import pytest

from jaxdist import errors, extras
from jaxdist.rundir import open_writers, writers


class Lines:
    """A writer of another package, which keeps its rows; the test finds it by the run it was made for."""

    made: typing.ClassVar[list] = []

    def __init__(self, run):
        self.run, self.rows = run, []
        Lines.made.append(self)

    def write(self, step, metrics):
        if metrics.get("fails"):
            raise ConnectionError("no route")
        self.rows.append((step, dict(metrics)))

    def close(self):
        self.rows.append("closed")


@pytest.fixture
def added(monkeypatch):
    point = importlib.metadata.EntryPoint("lines", f"{__name__}:Lines", open_writers.GROUP)
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point] if group == open_writers.GROUP else []
    )


def test_a_package_adds_a_writer_by_an_entry_point(tmp_path, added):
    writers.check(("jsonl", "lines"))
    rows, made = writers.make_writers(tmp_path, ("jsonl", "lines"), name="x", config={"seed": 1}, resumed_step=3)
    made.write(4, {"train/loss": 0.5})
    for writer in (rows, made):
        writer.close()
    assert Lines.made[-1].rows == [(4, {"train/loss": 0.5}), "closed"]
    assert Lines.made[-1].run == open_writers.WrittenRun(tmp_path, "x", {"seed": 1}, 3)
    assert not made.takes_rich_values


def test_an_unknown_writer_is_refused_with_the_nearest_name(added):
    with pytest.raises(errors.UserError, match="Did you mean 'jsonl'"):
        writers.check(("json",))
    with pytest.raises(errors.UserError, match="mlflow, trackio, wandb, lines"):
        writers.check(("xyz",))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_names_its_extra(name, monkeypatch):
    def missing(module, *, extra):
        raise extras.MissingExtra(f"{module} is not installed, it comes with the extra {extra!r}.")

    monkeypatch.setattr(extras, "require", missing)
    with pytest.raises(errors.UserError, match=f"comes with the extra '{name}'"):
        writers.check((name,))


def test_a_tracker_that_fails_is_told_once_and_tried_again_after_a_minute(capsys):
    now = [0.0]
    lines = Lines(None)
    writer = open_writers.Tolerant(lines, "lines", clock=lambda: now[0])
    for step, fails in ((1, 0), (2, 1), (3, 0)):
        writer.write(step, {"fails": fails})
    now[0] = 61.0
    writer.write(4, {"fails": 1})
    now[0] = 200.0
    writer.write(5, {"fails": 0})
    writer.close()
    assert lines.rows == [(1, {"fails": 0}), (5, {"fails": 0}), "closed"]
    said = capsys.readouterr().err
    assert said.count("The writer lines failed: ConnectionError: no route.") == 1


def test_a_tracker_that_cannot_begin_is_one_message(tmp_path, added, monkeypatch):
    def broken(self, run):
        raise ConnectionError("no route")

    monkeypatch.setattr(Lines, "__init__", broken)
    with pytest.raises(errors.UserError, match=r"The writer lines could not start: .*no route"):
        open_writers.make("lines", open_writers.WrittenRun(pathlib.Path(), "x", {}, None))
