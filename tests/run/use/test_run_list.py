import dataclasses

import pytest

from jaxdist import errors
from jaxdist.run.use import run_list
from jaxdist.rundir import lock, record


def write(run_dir, *, started=None, best=None, config=None, **changes):
    values = {
        "end_reason": "max_steps",
        "step": 10,
        "examples_seen": 160,
        "params_sha256": "aa",
        "metrics": {"eval/accuracy": 0.5},
        "strategy": "data-parallel",
        "reduction": "mean",
        "num_devices": 1,
        "num_processes": 1,
        "examples_per_second": 100.0,
        "step_seconds": {"p50": 0.1, "p95": 0.1},
        "time_seconds": {"input": 1.0, "compute": 2.5},
        "compile_count": 1,
        "restarts": 0,
        "config": config or {"seed": 0},
        "versions": {"jax": "1"},
        "command": "jaxdist train x.py",
        "extra": {"started": started, "best": best},
    }
    run_dir.mkdir(parents=True)
    record.RunRecord(**(values | changes)).write(run_dir)
    return run_dir


def test_runs_are_listed_in_the_order_of_their_start(tmp_path):
    best = {"metric": "eval/accuracy", "value": 0.75, "step": 6}
    write(tmp_path / "b", started="2026-11-28T10:00:00", best=best)
    write(tmp_path / "a", started="2026-11-28T11:00:00", end_reason=None)
    running = write(tmp_path / "c", started="2026-11-28T12:00:00", end_reason=None)
    (tmp_path / "no run").mkdir()
    with lock.locked(running, purpose="a test"):
        entries = run_list.find(tmp_path)
    assert [(entry.name, entry.ended) for entry in entries] == [
        ("b", "max_steps"),
        ("a", "interrupted"),
        ("c", "running"),
    ]
    assert dataclasses.asdict(entries[0]) == {
        "name": "b",
        "started": "2026-11-28T10:00:00",
        "ended": "max_steps",
        "step": 10,
        "seconds": 3.5,
        "best": best,
        "metrics": {"eval/accuracy": 0.5},
    }
    header, first, *_ = run_list.show(entries, width=120).splitlines()
    assert header.split(maxsplit=5) == ["name", "started", "ended", "step", "seconds", "best @ step"]
    assert first.split() == ["b", "2026-11-28", "10:00", "max_steps", "10", "3.5", "accuracy", "0.75", "@", "6"]


def test_a_list_of_usual_runs_fits_on_80_columns_with_its_best_value(tmp_path):
    best = {"metric": "eval/accuracy", "value": 0.97777, "step": 400}
    write(
        tmp_path / "digits_cnn-20261128-231745-123456",
        started="2026-11-28T23:17:45",
        end_reason="target_reached",
        best=best,
    )
    shown = run_list.show(run_list.find(tmp_path), width=80).splitlines()
    assert max(map(len, shown)) <= 80
    assert shown[1].startswith("digits_cnn-20261128-231745-123456")
    assert shown[1].endswith("accuracy 0.9778 @ 400")


def test_a_comparison_names_what_differs_and_nothing_else(tmp_path):
    runs = [
        write(tmp_path / "a", config={"seed": 0, "model": {"width": 32}}, metrics={"train/loss": 0.5}),
        write(tmp_path / "b", config={"seed": 0, "model": {"width": 64}}, metrics={"train/loss": 0.25, "extra": 1}),
    ]
    found = run_list.compare(runs)
    assert found == {"config": {"model.width": [32, 64]}, "result": {"train/loss": [0.5, 0.25], "extra": [None, 1]}}
    assert [line.split() for line in run_list.show_comparison(runs, found, width=80).splitlines()] == [
        ["a", "b"],
        ["model.width", "32", "64"],
        ["train/loss", "0.5", "0.25"],
        ["extra", "None", "1"],
    ]


def test_runs_of_one_name_are_compared_by_their_paths(tmp_path):
    runs = [write(tmp_path / folder / "run", metrics={"x": number}) for number, folder in enumerate("ab")]
    shown = run_list.show_comparison(runs, run_list.compare(runs), width=1000)
    assert shown.splitlines()[0].split() == [str(run) for run in runs]


def test_a_comparison_that_is_wider_than_the_terminal_has_a_line_for_each_run(tmp_path):
    names = [f"{name * 20}-20261128-120000-000000" for name in ("a", "b", "c")]
    found = {"config": {"model.width": [32, 64, 128]}, "result": {"params_sha256": ["0" * 64, "1" * 64, None]}}
    shown = run_list.show_comparison([tmp_path / name for name in names], found, width=80)
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.splitlines()[:4] == [
        "model.width",
        *(f"  {name}  {value}" for name, value in zip(names, (32, 64, 128))),
    ]
    assert shown.splitlines()[4:7] == ["params_sha256", f"  {names[0]}", f"    {'0' * 64}"]
    narrow = run_list.show_comparison([tmp_path / name for name in names], found, width=30)
    assert max(map(len, narrow.splitlines())) <= 30
    assert "".join(narrow.split()).count("1" * 64) == 1


def test_a_run_whose_record_cannot_be_read_hides_no_other(tmp_path):
    write(tmp_path / "whole")
    cut = write(tmp_path / "cut") / record.FILE_NAME
    cut.write_text(cut.read_text()[:200])
    with pytest.warns(UserWarning, match=r"left out of the list.*cut/run\.json is not"):
        assert [entry.name for entry in run_list.find(tmp_path)] == ["whole"]
    (tmp_path / "whole" / record.FILE_NAME).unlink()
    with pytest.raises(errors.UserError, match=r"cut/run\.json is not"):
        run_list.find(tmp_path)


def test_what_holds_no_run_is_named(tmp_path):
    with pytest.raises(errors.UserError, match="there is no folder"):
        run_list.find(tmp_path / "missing")
    with pytest.raises(errors.UserError, match="contains no run"):
        run_list.find(tmp_path)
    with pytest.raises(errors.UserError, match="two or more run directories; got 1"):
        run_list.compare([tmp_path])
    with pytest.raises(errors.UserError, match=r"run\.json"):
        run_list.compare([tmp_path, tmp_path])
