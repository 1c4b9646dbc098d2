"""Curves: what the rows hold, thinned without losing a spike, and the counts of confusion matrices."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.run.use.reporting import curves
from jaxdist.rundir import confusion

NUMBERS = st.one_of(st.floats(-10, 10), st.just(float("nan")))


@given(values=st.lists(NUMBERS, max_size=300), most=st.integers(5, 60))
def test_a_thinned_curve_keeps_its_ends_its_extremes_and_where_it_was_not_finite(values, most):
    values = np.array(values, np.float64)
    kept = curves.thin(values, most)
    assert list(kept) == sorted(set(kept))
    assert len(kept) <= max(most, 5)
    if len(values) <= most:
        assert list(kept) == list(range(len(values)))
        return
    assert {0, len(values) - 1} <= set(kept)
    assert np.isnan(values).any() == np.isnan(values[kept]).any()
    if np.isfinite(values).any():
        assert np.nanmax(values[kept]) == np.nanmax(values)
        assert np.nanmin(values[kept]) == np.nanmin(values)


def row(step, **metrics):
    return {"step": step, "examples_seen": 16 * step, "seconds": step / 4, **metrics}


def test_a_metric_has_its_steps_examples_seconds_and_values_in_six_digits():
    found = curves.curves([row(1, loss=0.123456789), row(2, other=1), row(4, loss=None)], most_points=9)
    assert found["loss"] == curves.Curve([1, 4], [16, 64], [0.25, 1.0], [0.123457, None], 2)
    assert found["other"].values == [1]


def test_the_speed_is_that_between_two_rows():
    rows = [row(1), row(3), row(3) | {"step": 4, "examples_seen": 100}, row(5)]  # no time passes before the third
    assert curves.curves(rows, most_points=9)[curves.SPEED] == curves.Curve([3], [48], [0.75], [64.0], 1)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    assert curves.read_rows(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1)) + '\n{"step": 2, "los')
    assert curves.read_rows(tmp_path) == [row(1)]


@pytest.mark.parametrize(
    "line", ['{"step": 2, "los', "[]", '{"step": "two"}', '{"step": 2, "loss": "low"}', "\xfd", "{}"]
)
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(row(1))}\n{line}\n", encoding="latin-1")
    with pytest.raises(ValueError, match="must hold one JSON object per line, and line 2 is none"):
        curves.read_rows(tmp_path)


def test_confusion_matrices_are_put_together_and_have_no_curves():
    metrics = {"eval/day/confusion_0_1": 2.0, "eval/day/confusion_1_1": 3.0, "eval/loss": 1.0, "eval/confusion_0_0": 4}
    assert confusion.matrices(metrics) == {"eval/day": [[0.0, 2.0], [0.0, 3.0]], "eval": [[4]]}
    assert list(curves.curves([row(1, **metrics)], most_points=9)) == ["eval/loss"]
