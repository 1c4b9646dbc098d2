"""`jaxdist data` on the command line; the work itself is tested with `data.prepare` and `data.inspect`."""

import jax
import numpy as np
import pandas
import pytest
import tiny_experiment

from jaxdist.cli import main
from jaxdist.launch.joining import runtime


@pytest.fixture(autouse=True)
def on_the_test_devices(monkeypatch):
    monkeypatch.setattr(runtime, "start", lambda num_devices=None, threads=None: jax.devices()[: num_devices or 1])


def test_text_becomes_tokens(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello, world")
    assert main.run(["data", "prepare", str(tmp_path / "a.txt"), str(tmp_path / "out"), "--shard-size", "5"]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    shards = [np.load(file) for file in sorted((tmp_path / "out").glob("*.npy"))]
    assert [len(shard) for shard in shards] == [5, 5, 2]
    assert np.concatenate(shards).astype(np.uint8).tobytes() == b"hello, world"


@pytest.mark.parametrize("arguments", [["prepare", "{0}/nothing", "{0}/out"], ["inspect", "{0}/nothing.py"]])
def test_a_mistake_is_one_message(arguments, tmp_path, capsys):
    assert main.run(["data", *(argument.format(tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("jaxdist: ")
    assert "Traceback" not in error


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_what_cannot_be_prepared_says_what_a_command_can_do(kind, tmp_path, capsys):
    table, out = tmp_path / f"t.{kind}", tmp_path / "out"
    pandas.DataFrame({"a": [1], "note": ["x"]}).to_csv(tmp_path / "t.csv", index=False)
    pandas.DataFrame({"a": [1], "note": ["x"]}).to_parquet(tmp_path / "t.parquet")
    assert main.run(["data", "prepare", str(table), str(out)]) == 2
    assert "'note'" in (error := capsys.readouterr().err)
    assert "Leave the column out of the file, or prepare a source from Python" in error
    assert main.run(["data", "prepare", str(tmp_path / "t.cvs"), str(out)]) == 2
    assert f"There is no file or folder {tmp_path}/t.cvs" in capsys.readouterr().err
    assert not out.exists()


def test_the_data_of_an_experiment_are_shown(capsys):
    assert main.run(["data", "inspect", tiny_experiment.__file__]) == 0
    shown = capsys.readouterr().out
    assert "image" in shown
    assert str(tiny_experiment.NUM_TRAIN) in shown
