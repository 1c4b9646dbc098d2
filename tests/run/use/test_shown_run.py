import io

import pytest
import rich.console
import trained_tiny

from jaxdist.run.use import shown_run, trained
from jaxdist.rundir import record


def make_record(**changes):
    given = dict.fromkeys(record.KEYS, None) | {
        "end_reason": "max_steps",
        "step": 10,
        "examples_seen": 1234,
        "metrics": {"train/loss": 0.5, "eval/accuracy": 0.75, "eval/lost": None},
        "num_devices": 2,
        "strategy": "zero1",
        "time_seconds": {"compute": 1.5, "input": 0.5},
    }
    return record.RunRecord(**given | changes)


def test_a_run_is_shown_by_what_it_reached():
    made = make_record(extra={"best": {"metric": "eval/accuracy", "value": 0.8, "step": 8}})
    rows = shown_run.rows("s3://b/run", 8, made)
    assert rows["best eval/accuracy"] == "0.8 (step 8)"
    assert rows["trained on"] == "1,234 examples, 2 devices, zero1"
    assert (rows["seconds"], rows["train/loss"], "eval/lost" in rows) == ("2.0", "0.5", False)
    assert shown_run.as_line("s3://b/run", 8, made) == "TrainedRun('s3://b/run', step=8, eval/accuracy=0.75)"
    assert rows["ended"] == "max_steps at step 10"
    assert shown_run.rows("a", 8, make_record(end_reason=None))["ended"] == "not yet at step 10"


def test_html_is_escaped_and_a_terminal_gets_a_table():
    rows = {"<name>": "a & b"}
    assert shown_run.as_html(rows) == "<table><tr><th>&lt;name&gt;</th><td>a &amp; b</td></tr></table>"
    console = rich.console.Console(file=io.StringIO(), width=60)
    console.print(shown_run.as_table(rows))
    assert console.file.getvalue().split() == ["<name>", "a", "&", "b"]


@pytest.mark.slow
def test_a_loaded_run_shows_itself(tmp_path):
    made = trained_tiny.train(tmp_path / "a", "stop.max_steps=1")
    run = trained.load(tmp_path / "a")
    assert repr(run).startswith(f"TrainedRun('{tmp_path / 'a'}', step={made.step}, eval/")
    assert "<th>run directory</th>" in run._repr_html_()
    assert run.__rich__().row_count == len(run._rows())
