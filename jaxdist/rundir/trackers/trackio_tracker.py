"""Trackio as a writer: a store on this machine, or a Space. Its environment variables apply, such as TRACKIO_DIR."""

import contextlib
import io
import os
import uuid
from collections.abc import Mapping
from typing import Any

from jaxdist import extras
from jaxdist.rundir.open_writers import WrittenRun
from jaxdist.rundir.rich_values import Histogram, Image, RichValue, Table

PROJECT = "jaxdist"
_NAME_FILE = "trackio-name.txt"


def check() -> None:
    """Raise MissingExtra if trackio is not installed."""
    extras.require("trackio", extra="trackio")


def make(run: WrittenRun) -> "TrackioWriter":
    """Return the writer of a run; a resumed run continues its run of Trackio."""
    return TrackioWriter(extras.require("trackio", extra="trackio"), run)


class TrackioWriter:
    """Writes to a run of Trackio by step: rows that a resumed run repeats are logged again."""

    def __init__(self, trackio: Any, run: WrittenRun) -> None:
        self._trackio = trackio
        begun = run.noted(_NAME_FILE)
        # Runs are found by their names, so that of a run directory needs an ending that no other has.
        name = begun or f"{run.run_dir.name}-{uuid.uuid4().hex[:6]}"
        with _silent():
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=name,
                group=run.name,
                config=run.config,
                resume="allow" if begun else "never",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        (run.run_dir / _NAME_FILE).write_text(name)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a row; see Writer."""
        self._run.log(dict(metrics), step=step)

    def write_rich(self, step: int, values: Mapping[str, RichValue]) -> None:
        """Log images, histograms, tables and texts; see Writer."""
        self._run.log({name: self._converted(value) for name, value in values.items()}, step=step)

    def close(self) -> None:
        """End the run of Trackio; see Writer."""
        with _silent():
            self._run.finish()

    def _converted(self, value: RichValue) -> Any:
        match value:
            case Image():
                return self._trackio.Image(value.to_bytes())
            case Histogram():
                return self._trackio.Histogram(np_histogram=value.count())
            case Table():
                rows = [list(row) for row in value.rows]
                return self._trackio.Table(columns=list(value.columns), data=rows, allow_mixed_types=True)
        return self._trackio.Markdown(value.text)


def _silent() -> contextlib.AbstractContextManager[Any]:
    """Keep what Trackio prints off standard output, where the run record may be."""
    return contextlib.redirect_stdout(io.StringIO())
