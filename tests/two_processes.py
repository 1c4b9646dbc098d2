"""Two processes of a job, one after the other in this one: what the first tells, the second is told."""

import contextlib
from collections.abc import Iterator

import jax
import pytest

from jaxdist.spmd import device_program, jax_private


class TwoProcesses:
    """The store of their coordinator, and which of them runs.

    Attributes:
      kept: what the store holds.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.kept: dict[str, bytes] = {}
        self._process = 0
        monkeypatch.setattr(jax_private, "coordinator_store", lambda: self)
        monkeypatch.setattr(jax_private, "process_of_job", lambda: (self._process, 2))
        monkeypatch.setattr(device_program, "_spans", lambda mesh, count: True)

    @contextlib.contextmanager
    def run(self, process: int) -> Iterator[None]:
        """Be a process that has asked for nothing yet."""
        self._process = process
        device_program._numbers.cache_clear()
        yield
        device_program._numbers.cache_clear()

    def key_value_set_bytes(self, key: str, value: bytes) -> None:
        assert key not in self.kept
        self.kept[key] = value

    def blocking_key_value_get_bytes(self, key: str, milliseconds: int) -> bytes:
        del milliseconds
        if key not in self.kept:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.kept[key]
