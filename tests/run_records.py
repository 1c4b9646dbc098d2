"""The least that a run record holds, for tests of something else."""

from jaxdist.rundir import record

_COUNTS = dict.fromkeys(("step", "examples_seen", "num_devices", "num_processes", "compile_count", "restarts"), 0)
_TEXTS = dict.fromkeys(("strategy", "reduction", "command"), "")
_OBJECTS = {name: {} for name in ("metrics", "config", "versions", "step_seconds", "time_seconds")}
EMPTY = dict.fromkeys(record.KEYS) | _COUNTS | _TEXTS | _OBJECTS
