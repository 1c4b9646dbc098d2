"""The rates of the devices of this machine: measured once, kept beside the cache of plans."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jaxlib

from jaxdist.plan.calibrated import measuring, operation_rates, programs
from jaxdist.plan.compiled import facts
from jaxdist.rundir import files

_FORMAT = 3


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Rates, and when they were measured.

    Attributes:
      rates: of operations and steps.
      measured: the day, as in 2026-11-29.
      programs: name of each that was measured -> seconds of its step.
    """

    rates: operation_rates.Rates
    measured: str
    programs: Mapping[str, float]

    def describe(self) -> str:
        """Return when and with what it was made, and how well it gives what it was made from."""
        return (
            f"rates measured here on {self.measured}; the {len(self.programs)} programs they are from: median error "
            f"{self.rates.error:.0%}"
        )


def find(devices: Sequence[jax.Device], *, show: Callable[[int, int, str], None]) -> Calibration:
    """Return the calibration of so many devices of this machine, measured now unless it was before."""
    path = facts.cache_folder() / f"calibration-{_key(len(devices))}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return Calibration(**content | {"rates": operation_rates.Rates(**content["rates"])})
    measured = measuring.measure(programs.experiments(len(devices)), devices, show=show)
    seconds = {each.name: each.step_seconds for each in measured}
    found = Calibration(operation_rates.fit(measured), datetime.date.today().isoformat(), seconds)
    with contextlib.suppress(OSError):  # A cache that cannot be written costs time, nothing else.
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, [json.dumps(dataclasses.asdict(found)).encode()])
    return found


def _key(num_devices: int) -> str:
    processor = ""
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line for line in lines if line.startswith("model name")), "")
    parts = (_FORMAT, num_devices, processor, os.cpu_count(), len(os.sched_getaffinity(0)), jax.__version__)
    text = "\0".join(map(str, (*parts, jaxlib.__version__, os.environ.get("XLA_FLAGS", ""))))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
