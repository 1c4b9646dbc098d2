"""Weights & Biases as a writer. Its environment variables apply: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY."""

import html
import os
from collections.abc import Mapping
from typing import Any

from jaxdist import errors, extras
from jaxdist.rundir.open_writers import WrittenRun
from jaxdist.rundir.rich_values import Histogram, Image, RichValue, Table

PROJECT = "jaxdist"
_ID_FILE = "wandb-id.txt"


def check() -> None:
    """Raise MissingExtra if wandb is not installed, UserError if it could not log in."""
    wandb = extras.require("wandb", extra="wandb")
    if wandb.setup().settings.mode != "online":
        return
    try:
        is_let_in, why = wandb.login(prompt=False), "no API key is known here"
    except Exception as error:
        is_let_in, why = False, " ".join(str(error).split()).rstrip(".")
    if not is_let_in:
        raise errors.UserError(
            f"The writer wandb needs to log in; {why}. Run `wandb login`, or set WANDB_MODE=offline and send it later."
        )


def make(run: WrittenRun) -> "WandbWriter":
    """Return the writer of a run; a resumed run continues its run of W&B."""
    return WandbWriter(extras.require("wandb", extra="wandb"), run)


class WandbWriter:
    """Writes to a run of W&B whose x axis is the step: rows that a resumed run repeats are logged again."""

    def __init__(self, wandb: Any, run: WrittenRun) -> None:
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.run_dir.name,
            group=run.name,
            id=run.noted(_ID_FILE),
            resume=None if run.resumed_step is None else "allow",
            dir=str(run.run_dir),
            config=run.config,
            settings=wandb.Settings(console="off", silent=True),
        )
        (run.run_dir / _ID_FILE).write_text(self._run.id)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a row; see Writer."""
        self._run.log({"step": step, **metrics})

    def write_rich(self, step: int, values: Mapping[str, RichValue]) -> None:
        """Log images, histograms, tables and texts; see Writer."""
        self._run.log({"step": step, **{name: self._converted(value) for name, value in values.items()}})

    def close(self) -> None:
        """End the run of W&B; see Writer."""
        self._run.finish()

    def _converted(self, value: RichValue) -> Any:
        match value:
            case Image():
                return self._wandb.Image(value.to_bytes())
            case Histogram():
                return self._wandb.Histogram(np_histogram=value.count())
            case Table():
                rows = [list(row) for row in value.rows]
                return self._wandb.Table(columns=list(value.columns), data=rows, allow_mixed_types=True)
        return self._wandb.Html(f"<pre>{html.escape(value.text)}</pre>", inject=False)
