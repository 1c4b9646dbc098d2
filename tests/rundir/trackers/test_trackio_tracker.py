"""Trackio: the real package with its local store (marked), and what is said where it is missing."""

import sys

import numpy as np
import pytest

from jaxdist import errors
from jaxdist.rundir import rich_values, writers


def test_where_it_is_missing_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(errors.UserError, match=r"pip install 'jaxdist\[trackio\]'"):
        writers.check(("trackio",))


@pytest.mark.trackio
def test_a_run_and_its_resume_are_one_run_with_each_step_and_another_of_its_name_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    from trackio.sqlite_storage import SQLiteStorage

    def write(folder, steps, resumed_step=None):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        run = {"name": "x", "config": {"seed": 7}, "resumed_step": resumed_step}
        (writer,) = writers.make_writers(tmp_path / folder, ("trackio",), **run)
        for step in steps:
            writer.write(step, {"train/loss": 1.0 / step})
        writer.write_rich(
            steps[-1],
            {
                "mine/image": rich_values.Image(np.zeros((4, 4))),
                "mine/histogram": rich_values.Histogram([1.0, 2.0]),
                "mine/table": rich_values.Table(("a",), [(1,), ("b",)]),
                "mine/text": rich_values.Text("a text"),
            },
        )
        writer.close()
        return (tmp_path / folder / "trackio-name.txt").read_text()

    first = write("one/run", [1, 2])
    assert write("one/run", [3, 4], resumed_step=2) == first
    assert first.startswith("run-")
    other = write("two/run", [1])
    assert other != first
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "failed" not in printed.err
    rows = SQLiteStorage.get_logs("jaxdist", first)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert sum("mine/table" in row for row in rows) == 2
