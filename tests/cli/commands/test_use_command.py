"""What is done with a trained run on the command line: one run, listed, evaluated, predicted with and exported."""

import http.server
import json

import compile_cache
import jax
import numpy as np
import pytest
from trained_tiny import held_out, train

import jaxdist
from jaxdist.cli import main
from jaxdist.launch.joining import runtime


@pytest.fixture(autouse=True)
def on_the_test_devices(monkeypatch):
    monkeypatch.setattr(runtime, "start", lambda num_devices=None, threads=None: jax.devices()[: num_devices or 1])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    with compile_cache.compile_once(tmp_path_factory.mktemp("xla")):
        run_dir = tmp_path_factory.mktemp("runs") / "a"
        train(run_dir)
        yield run_dir


def shown(capsys, *arguments):
    """Run a command that must succeed; return what it prints."""
    assert main.run([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_runs_are_listed_as_a_table_and_as_json(run_dir, capsys):
    assert "max_steps" in shown(capsys, "runs", run_dir.parent)
    (entry,) = json.loads(shown(capsys, "runs", run_dir.parent, "--json"))
    assert (entry["name"], entry["step"]) == ("a", 10)


def test_the_default_folder_is_runs(run_dir, capsys, monkeypatch, tmp_path):
    (tmp_path / "runs").symlink_to(run_dir.parent)
    monkeypatch.chdir(tmp_path)
    assert [entry["name"] for entry in json.loads(shown(capsys, "runs", "--json"))] == ["a"]


def test_two_runs_are_compared(run_dir, capsys):
    assert json.loads(shown(capsys, "runs", "compare", run_dir, run_dir, "--json"))["config"] == {}


def test_a_report_is_written_into_the_run_directory_and_of_several_where_asked(run_dir, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown(capsys, "report", run_dir).startswith(f"{run_dir / 'report.html'}: the report, 2.0 MB")
    shown(capsys, "report", run_dir, run_dir)
    shown(capsys, "report", run_dir, "--out", "x.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "x.html"]
    assert "eval/accuracy" in (tmp_path / "x.html").read_text()


def test_a_live_report_is_served_until_it_is_interrupted(run_dir, capsys, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(http.server.ThreadingHTTPServer, "serve_forever", interrupted)
    assert shown(capsys, "report", run_dir, "--live").startswith("http://127.0.0.1:")


@pytest.mark.parametrize("name", ["eval", "train", "file"])
def test_metrics_are_those_of_the_named_data(run_dir, capsys, tmp_path, name):
    np.savez(tmp_path / "held_out.npz", **held_out())
    run = jaxdist.load(run_dir, devices=jax.devices()[:1])
    data = str(tmp_path / "held_out.npz") if name == "file" else name
    expected = run.evaluate(run.experiment.data.train if name == "train" else held_out())
    printed = json.loads(shown(capsys, "eval", run_dir, "--data", data, "--json"))
    assert printed == {"run_dir": str(run_dir), "step": run.step, "data": data, "metrics": expected}
    assert f"step {run.step}, {data}: " in shown(capsys, "eval", run_dir, "--data", data)


def test_data_that_are_not_there_are_told_with_the_names_that_are(run_dir, capsys, tmp_path):
    assert main.run(["eval", str(run_dir), "--data", "val", "--json"]) == 2
    told = capsys.readouterr()
    assert (told.out, "--data is eval, train, a file or folder, or tfds:" in told.err) == ("", True)
    assert main.run(["eval", str(run_dir), "--experiment", str(tmp_path / "x.py")]) == 2
    assert f"is to be {tmp_path}/x.py, which is not there" in capsys.readouterr().err


@pytest.mark.parametrize("checkpoint", ["last", "8"])
def test_a_checkpoint_can_be_named(run_dir, capsys, checkpoint):
    step = json.loads(shown(capsys, "eval", run_dir, "--checkpoint", checkpoint, "--json"))["step"]
    assert step == (10 if checkpoint == "last" else 8)


def test_predictions_and_exports_are_files(run_dir, capsys, tmp_path):
    np.save(tmp_path / "in.npy", held_out()["image"])
    said = shown(capsys, "predict", run_dir, tmp_path / "in.npy", tmp_path / "out.npz")
    assert said == f"{tmp_path / 'out.npz'}: the outputs of step 10\n"
    with np.load(tmp_path / "out.npz") as content:
        expected = jaxdist.load(run_dir, devices=jax.devices()[:1]).predict(held_out()["image"])
        np.testing.assert_array_equal(content["output"], expected)
    said = shown(capsys, "export", run_dir, tmp_path / "model.npz", "--format", "npz")
    assert said == f"{tmp_path / 'model.npz'}: the model of step 10 as npz\n"


def test_names_of_transformers_are_for_its_models(run_dir, capsys, tmp_path):
    command = ["export", run_dir, tmp_path / "out", "--format", "safetensors", "--names", "hugging-face"]
    assert main.run([*map(str, command)]) == 2
    assert "known for jaxdist's GPT, ViT and ResNet; the model is MLP" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_refused_before_the_run_is_loaded(tmp_path, capsys):
    (tmp_path / "out.npz").write_text("precious")
    assert main.run(["predict", str(tmp_path / "no run"), "in.npy", str(tmp_path / "out.npz")]) == 2
    assert "exists" in capsys.readouterr().err
