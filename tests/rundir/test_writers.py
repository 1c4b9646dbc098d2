"""Writers: every step once and in order, also after a kill; real event files; a full disk names the file."""

import contextlib
import csv
import io
import json
import math
import resource

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing import event_accumulator

from jaxdist.rundir import rich_values, writers


def rows_of(path):
    if path.suffix == ".csv":
        table = list(csv.DictReader(path.read_text().splitlines()))
        return [
            {name: int(field) if name == "step" else float(field) for name, field in row.items() if field}
            for row in table
        ]
    return [json.loads(line) for line in path.read_text().splitlines()]


FILES = [("metrics.jsonl", writers.JsonlWriter), ("metrics.csv", writers.CsvWriter)]
every_writer = pytest.mark.parametrize("make", [writers.JsonlWriter, writers.CsvWriter, writers.TensorBoardWriter])
each_file = pytest.mark.parametrize(("name", "make"), FILES)
METRICS = st.dictionaries(st.sampled_from(["train/loss", "eval/accuracy", 'odd, "name"']), st.floats(-1e6, 1e6))


@each_file
@given(
    history=st.lists(st.tuples(st.integers(0, 2), METRICS), max_size=12),
    kill=st.integers(0, 12),
    back=st.integers(0, 6),
)
def test_resuming_equals_never_stopping(tmp_path_factory, name, make, history, kill, back):
    """Write, die after `kill` calls, resume `back` steps earlier and write on: the file of the undisturbed run."""
    run = tmp_path_factory.mktemp("run")
    calls, step = [], 0
    for ahead, metrics in history:
        step += ahead
        calls.append((step, metrics))
    undisturbed = make(run / f"whole_{name}")
    for step, metrics in calls:
        undisturbed.write(step, metrics)
    undisturbed.close()

    died = make(run / name)
    for step, metrics in calls[:kill]:
        died.write(step, metrics)
    died.close()
    resumed_step = max((calls[:kill][-1][0] if calls[:kill] else 0) - back, 0)
    resumed = make(run / name, resumed_step=resumed_step)
    # A resumed run repeats what comes after its checkpoint; metrics of the checkpoint's own step may come again, too.
    for step, metrics in [call for call in calls if call[0] >= resumed_step]:
        resumed.write(step, metrics)
    resumed.close()
    expected, got = rows_of(run / f"whole_{name}"), rows_of(run / name)
    assert got == expected
    assert [row["step"] for row in got] == sorted({step for step, _ in calls})


@each_file
def test_metrics_of_one_step_are_one_row_and_stand_there_at_once(tmp_path, name, make):
    writer = make(tmp_path / name)
    writer.write(1, {"a": 1.0})
    assert rows_of(tmp_path / name) == [{"step": 1, "a": 1.0}]
    writer.write(1, {"b": 2.0, "a": 3.0})
    writer.write(2, {"c": 4.0})
    assert rows_of(tmp_path / name) == [{"step": 1, "a": 3.0, "b": 2.0}, {"step": 2, "c": 4.0}]
    writer.close()
    writer.close()


@each_file
def test_a_row_put_again_may_be_shorter(tmp_path, name, make):
    writer = make(tmp_path / name)
    writer.write(1, {"a": 0.123456789})
    writer.write(1, {"a": 0.5})
    writer.write(2, {"a": 0.25})
    writer.close()
    assert rows_of(tmp_path / name) == [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.25}]


@each_file
def test_a_torn_last_line_is_dropped(tmp_path, name, make):
    writer = make(tmp_path / name)
    for step in (1, 2, 3):
        writer.write(step, {"a": step / 8})
    writer.close()
    whole = (tmp_path / name).read_bytes()
    for torn_bytes in range(1, 9):
        (tmp_path / name).write_bytes(whole[:-torn_bytes])
        resumed = make(tmp_path / name, resumed_step=3)
        resumed.write(3, {"a": 0.5})
        resumed.close()
        assert rows_of(tmp_path / name) == [{"step": 1, "a": 0.125}, {"step": 2, "a": 0.25}, {"step": 3, "a": 0.5}]


@each_file
def test_a_foreign_file_is_named_and_left_alone(tmp_path, name, make):
    (tmp_path / name).write_text("dear diary\ntoday I trained\nnothing\n")
    with pytest.raises(ValueError, match=r"line [12] is not a row.*diary|line [12] is not a row") as caught:
        make(tmp_path / name, resumed_step=5)
    assert str(tmp_path / name) in str(caught.value)
    assert (tmp_path / name).read_text() == "dear diary\ntoday I trained\nnothing\n"


@each_file
def test_a_fresh_run_overwrites_nothing(tmp_path, name, make):
    make(tmp_path / name).close()
    with pytest.raises(FileExistsError, match=name):
        make(tmp_path / name)


@each_file
def test_rows_keep_the_order_of_steps(tmp_path, name, make):
    writer = make(tmp_path / name)
    writer.write(4, {"a": 1.0})
    with pytest.raises(ValueError, match="order of steps"):
        writer.write(3, {"a": 1.0})
    with pytest.raises(ValueError, match="'step'"):
        writer.write(5, {"step": 1.0})
    writer.close()


def test_jsonl_has_no_nan(tmp_path):
    writer = writers.JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"a": math.nan, "b": math.inf, "c": jax.numpy.float32(0.5)})
    writer.close()
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": 0.5}\n'


def test_csv_reads_as_a_table(tmp_path):
    writer = writers.CsvWriter(tmp_path / "m.csv")
    writer.write(1, {"loss": 0.5})
    writer.write(2, {"loss": math.nan, "eval, all": 1.0})
    writer.close()
    assert (tmp_path / "m.csv").read_text() == 'step,loss,"eval, all"\n1,0.5,\n2,nan,1.0\n'


@contextlib.contextmanager
def no_file_beyond(num_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@every_writer
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, make):
    writer = make(tmp_path / "full")
    writer.write(1, {"train/loss": 0.123456})
    with no_file_beyond(200), pytest.raises(OSError, match="full"):
        [writer.write(step, {"train/loss": 0.123456}) for step in range(2, 99)]
    writer.close()


@every_writer
def test_a_place_that_cannot_be_written_is_named(tmp_path, make):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/inside"):
        make(tmp_path / "file" / "inside")


def scalars(log_dir, tag):
    accumulator = event_accumulator.EventAccumulator(str(log_dir)).Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_reads_what_was_written_and_forgets_what_a_resumed_run_repeats(tmp_path):
    first = writers.TensorBoardWriter(tmp_path)
    for step in (1, 2, 3, 4):
        first.write(step, {"train/loss": step / 2, "train/accuracy": 0.25})
    assert scalars(tmp_path, "train/loss") == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    first.close()
    first.close()

    resumed = writers.TensorBoardWriter(tmp_path, resumed_step=2)
    resumed.write(3, {"train/loss": 9.0})
    resumed.close()
    assert scalars(tmp_path, "train/loss") == [(1, 0.5), (2, 1.0), (3, 9.0)]
    with pytest.raises(FileExistsError, match="tfevents"):
        writers.TensorBoardWriter(tmp_path)


def test_the_console_gets_plain_lines():
    stream = io.StringIO()
    writer = writers.ConsoleWriter(stream)
    writer.write(120, {"train/loss": 0.123456, "eval/accuracy": 0.985})
    writer.close()
    assert stream.getvalue() == "step 120  train/loss 0.1235  eval/accuracy 0.985\n"


def test_tensorboard_has_images_histograms_tables_and_texts(tmp_path):
    values = {
        "mine/image": rich_values.Image(np.full((5, 7), 0.5)),
        "mine/histogram": rich_values.Histogram(np.arange(10.0)),
        "mine/table": rich_values.Table(("a", "b"), [(1, 2)]),
        "mine/text": rich_values.Text("a text"),
    }
    writer = writers.Patient(writers.TensorBoardWriter(tmp_path))
    assert writer.takes_rich_values
    writer.write_rich(3, values)
    writer.close()
    found = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    (image,) = found.Images("mine/image")
    assert (image.step, image.width, image.height) == (3, 7, 5)
    (histogram,) = found.Histograms("mine/histogram")
    value = histogram.histogram_value
    assert (value.num, value.min, value.max, sum(value.bucket)) == (10, 0.0, 9.0, 10)
    texts = [found.Tensors(f"mine/{name}/text_summary")[0].tensor_proto.string_val[0] for name in ("text", "table")]
    assert texts == [b"a text", b"| a | b |\n| --- | --- |\n| 1 | 2 |"]


def test_a_writer_of_numbers_leaves_out_what_is_none(tmp_path):
    writer = writers.Patient(writers.JsonlWriter(tmp_path / "metrics.jsonl"))
    assert not writer.takes_rich_values
    writer.write_rich(3, {"mine/text": rich_values.Text("a text")})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_only_process_0_writes(tmp_path, monkeypatch):
    kinds = ("console", "jsonl", "csv", "tensorboard")
    made = writers.make_writers(tmp_path, kinds)
    assert [type(writer).__name__ for writer in made] == [
        "ConsoleWriter",
        "JsonlWriter",
        "CsvWriter",
        "TensorBoardWriter",
    ]
    for writer in made:
        writer.close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl", "tensorboard"]
    with pytest.raises(ValueError, match="console, jsonl, csv, tensorboard"):
        writers.make_writers(tmp_path, ("xyz",))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert writers.make_writers(tmp_path / "nowhere", kinds) == []
