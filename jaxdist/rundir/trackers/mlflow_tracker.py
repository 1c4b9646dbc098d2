"""MLflow as a writer, to the server or store that MLFLOW_TRACKING_URI names."""

import os
import time
from collections.abc import Mapping
from typing import Any

from jaxdist import errors, extras
from jaxdist.rundir import record
from jaxdist.rundir.open_writers import WrittenRun
from jaxdist.rundir.rich_values import Histogram, Image, RichValue, Table

URI = "MLFLOW_TRACKING_URI"
_ID_FILE = "mlflow-id.txt"
_MOST_PARAMS, _MOST_CHARACTERS = 100, 500
"""Params of a request, and characters of a param; MLflow's limits."""


def check() -> None:
    """Raise MissingExtra if mlflow is not installed, UserError if no store is set."""
    extras.require("mlflow", extra="mlflow")
    if not os.environ.get(URI):
        raise errors.UserError(
            f"The writer mlflow writes to the store that the environment variable {URI} names; it is not set. Set it, "
            "for example to http://HOST:5000, or to file:/PATH together with MLFLOW_ALLOW_FILE_STORE=true."
        )


def make(run: WrittenRun) -> "MlflowWriter":
    """Return the writer of a run; a resumed run continues its run of MLflow."""
    return MlflowWriter(extras.require("mlflow", extra="mlflow"), run)


class MlflowWriter:
    """Writes to a run of MLflow in the experiment of its name; rows that a resumed run repeats are logged again."""

    def __init__(self, mlflow: Any, run: WrittenRun) -> None:
        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient(tracking_uri=os.environ[URI])
        if (begun := run.noted(_ID_FILE)) is not None:
            self._id = begun
            self._client.update_run(begun, status="RUNNING")
            return
        known = self._client.get_experiment_by_name(run.name)
        experiment = known.experiment_id if known else self._client.create_experiment(run.name)
        self._id = self._client.create_run(experiment, run_name=run.run_dir.name).info.run_id
        (run.run_dir / _ID_FILE).write_text(self._id)
        self._log_params(record.flat("", run.config))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a row; see Writer."""
        now = int(time.time() * 1000)
        named = [self._entities.Metric(name, float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=named)

    def write_rich(self, step: int, values: Mapping[str, RichValue]) -> None:
        """Store images, histograms, tables and texts as artifacts, a folder for each name; see Writer."""
        for name, value in values.items():
            place = f"{name}/step-{step}"
            match value:
                case Image():
                    self._client.log_image(self._id, value.to_bytes(), f"{place}.png")
                case Histogram():
                    counts, edges = value.count()
                    self._client.log_dict(
                        self._id, {"counts": counts.tolist(), "edges": edges.tolist()}, f"{place}.json"
                    )
                case Table():
                    self._client.log_text(self._id, value.to_markdown(), f"{place}.md")
                case _:
                    self._client.log_text(self._id, value.text, f"{place}.md")

    def close(self) -> None:
        """End the run of MLflow; see Writer."""
        self._client.set_terminated(self._id)

    def _log_params(self, config: Mapping[str, Any]) -> None:
        params = [self._entities.Param(name, str(value)[:_MOST_CHARACTERS]) for name, value in config.items() if name]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + _MOST_PARAMS])
