"""What an attempt leaves in memory for the next one of its job: the programs of a step that process 0 has traced.

To trace and lower them takes process 0 longer than to load what was compiled, and the other processes wait for it. An
attempt after a crash therefore runs the programs that the job ran before, like a job that has not crashed: whatever a
loss or a model reads while it is traced is read once. They are for the same experiment, code, settings and number of
devices; where one of these has changed, process 0 traces again.
"""

import base64
import contextlib
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from jaxdist.config.experiment import Experiment
from jaxdist.launch.joining import same_on_all
from jaxdist.run import recovery
from jaxdist.run.loop import Hook
from jaxdist.rundir import files, record
from jaxdist.spmd import device_program


class Handover:
    """Takes over what an attempt before has left, and leaves it for the next; on process 0, which tells the others.

    `hashes` are those of the experiment's files, as in `same_on_all.files_of`. Without a `directory` in memory, or
    where the files are not known, nothing is handed over.
    """

    def __init__(
        self,
        directory: pathlib.Path | None,
        experiment: Experiment,
        identity: object,
        hashes: Mapping[str, str] | None,
        num_devices: int,
    ):
        self._path: pathlib.Path | None = None
        if directory is None or hashes is None or jax.process_index() != 0:
            return
        facts = same_on_all.of_start(None) | same_on_all.of_experiment(record.plain(experiment), hashes)
        text = json.dumps([facts, str(identity), num_devices], sort_keys=True)
        self._path = directory / f"traced-{_digest(text.encode())}"

    def take_over(self) -> None:
        """Have this process use what was left, and note what is new."""
        if self._path is not None:
            device_program.TOLD.begin(_read(self._path))

    def end(self) -> None:
        """Hand nothing over: the step is not that of the experiment alone, but of what was trained before."""
        self._path = None
        device_program.TOLD.end()

    def leave(self) -> Hook:
        """Return the hook that leaves it after the first step of the attempt."""
        return recovery.once(lambda info: True, lambda info: self._write())

    def _write(self) -> None:
        told = device_program.TOLD.all()
        if self._path is not None and told and told != _read(self._path):
            content = json.dumps({key: base64.b64encode(value).decode() for key, value in told.items()}).encode()
            files.write_unsynced(self._path, [_digest(content).encode(), content])
        device_program.TOLD.end()


def _read(path: pathlib.Path) -> dict[str, bytes]:
    """Return what was left in `path`; nothing where there is none, or it is damaged."""
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        stored = path.read_bytes()
        size = len(_digest(b""))
        if stored[:size] == _digest(stored[size:]).encode():
            found = json.loads(stored[size:])
    return {key: base64.b64decode(value) for key, value in found.items()}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
