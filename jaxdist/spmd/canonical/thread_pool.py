"""The number of XLA's threads on CPU devices, which decides bits: by it XLA divides products of matrices.

XLA starts a thread for each usable core, and at least one for each device of the process, unless the environment names
another number before JAX starts. Canonical runs have a number that depends on the experiment alone, so that it is the
same on every machine, for any number of devices.
"""

import os
import warnings
from collections.abc import Mapping, MutableMapping

LEAST = 8
_OURS = "JAXDIST_PJRT_NPROC"
"""Environment variable: the number that this package has set, as opposed to the user."""
_NAMES = ("PJRT_NPROC", "NPROC")


def size(num_devices: int = 1, environment: Mapping[str, str] = os.environ) -> int:
    """Return how many threads XLA starts in a process with `num_devices` CPU devices."""
    return max(_asked(environment) or len(os.sched_getaffinity(0)), num_devices)


def canonical_size(logical_shards: int) -> int:
    """Return how many threads a canonical run has: at least one for each device that it can have."""
    return max(LEAST, logical_shards)


def fix(threads: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have XLA start that many threads, unless the user has set PJRT_NPROC; without effect once JAX has started."""
    if environment.get("PJRT_NPROC") == environment.get(_OURS):
        environment["PJRT_NPROC"] = environment[_OURS] = str(threads)


def check(logical_shards: int, num_devices: int, environment: Mapping[str, str] = os.environ) -> None:
    """Warn where the bits of a canonical run depend on this machine or on its `num_devices` CPU devices.

    Raises:
      ValueError: there is one thread, for which XLA generates other code.
    """
    threads, wanted = size(num_devices, environment), canonical_size(logical_shards)
    if threads < 2:
        raise ValueError(
            "Canonical reduction on CPU devices needs a thread pool of two or more threads: XLA generates different "
            "code for one. It has one here: PJRT_NPROC or NPROC in the environment sets it, or this process may use "
            f"one core only. Set PJRT_NPROC={wanted} before it starts; more threads than cores are fine."
        )
    is_chosen = (_asked(environment) or 0) >= logical_shards
    if threads != wanted and not is_chosen:
        warnings.warn(
            "Canonical reduction on CPU devices gives bits that belong to the number of XLA's threads. It is "
            f"{threads} here, by the cores and devices of this process, or by an environment that names fewer than the "
            f"{logical_shards} logical shards. To get the same bits on other machines and numbers of devices, set "
            f"PJRT_NPROC={wanted} before JAX starts. `jaxdist train` does, unless the experiment's file starts JAX "
            "when it is loaded.",
            stacklevel=3,
        )


def _asked(environment: Mapping[str, str]) -> int | None:
    found = [environment[name] for name in _NAMES if environment.get(name, "").isdigit()]
    return int(found[0]) if found else None
