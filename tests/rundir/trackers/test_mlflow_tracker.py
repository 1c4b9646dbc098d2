"""MLflow, the real package with its file store: rows, params, artifacts, and a run that is resumed."""

import mlflow
import numpy as np
import pytest

from jaxdist import errors
from jaxdist.rundir import rich_values, writers


def test_a_run_and_what_is_resumed_are_one_run_with_rows_params_and_artifacts(tmp_path, monkeypatch):
    store = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    writers.check(("mlflow",))
    run_dir = tmp_path / "a"
    run_dir.mkdir()
    config = {"optimizer": {"learning_rate": 0.1}} | {f"setting_{number}": number for number in range(150)}
    (writer,) = writers.make_writers(run_dir, ("mlflow",), name="x", config=config)
    writer.write(1, {"train/loss": 0.5})
    writer.write_rich(1, {"mine/text": rich_values.Text("a text"), "mine/image": rich_values.Image(np.zeros((4, 4)))})
    writer.write_rich(1, {"mine/h": rich_values.Histogram([1.0]), "mine/t": rich_values.Table(("a",), [(1,)])})
    writer.close()
    (writer,) = writers.make_writers(run_dir, ("mlflow",), name="x", config=config, resumed_step=1)
    writer.write(2, {"train/loss": 0.25})
    writer.close()

    client = mlflow.MlflowClient(tracking_uri=store)
    (run,) = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    assert (run.info.run_name, run.info.status) == ("a", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.25)]
    assert (run.data.params["optimizer.learning_rate"], len(run.data.params)) == ("0.1", 151)
    stored = {path.as_posix().split("artifacts/")[1] for path in tmp_path.rglob("step-1.*")}
    assert stored == {"mine/text/step-1.md", "mine/image/step-1.png", "mine/h/step-1.json", "mine/t/step-1.md"}


def test_without_a_store_to_write_to_it_is_refused_before_the_run(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(errors.UserError, match="MLFLOW_TRACKING_URI names; it is not set"):
        writers.check(("mlflow",))
