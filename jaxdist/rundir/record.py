"""The run record: the content of `run.json`.

The file is always complete and always strict JSON. It is replaced by a rename, never edited, and a number
that JSON cannot hold (NaN, an infinity) is written as null.
"""

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import sys
from collections.abc import Mapping
from typing import Any, TypeAlias, get_type_hints

import jax
import numpy as np

from jaxdist import errors
from jaxdist.rundir import files, further_keys, json_kinds
from jaxdist.spmd.layout import host_value, path_name

FILE_NAME = "run.json"

END_REASONS = (
    "target_reached",
    "max_steps",
    "max_epochs",
    "max_seconds",
    "patience",
    "nonfinite",
    "preempted",
    "hang",
    "faulty_device",
    "error",
)

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""What JSON can hold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of `run.json`: each field is a key of the file, and so is each key of `extra`."""

    end_reason: str | None
    """One of END_REASONS, None while the run continues."""
    step: int
    examples_seen: int
    params_sha256: str | None
    metrics: Mapping[str, float | None]
    """The last value of each metric, for example `train/loss`; None if it was not finite."""
    strategy: str
    reduction: str
    num_devices: int
    num_processes: int
    examples_per_second: float | None
    step_seconds: Mapping[str, float | None]
    """`p50` and `p95`, seconds; see StepTimes."""
    time_seconds: Mapping[str, float]
    """Seconds by account; see Stopwatch."""
    compile_count: int
    restarts: int
    config: Any
    """The experiment; written through `plain`."""
    versions: Mapping[str, str | None]
    command: str
    """The command line, quoted for a shell."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further top-level keys, for example `ps` of the parameter server; none may have a name from above."""

    def __post_init__(self) -> None:
        if self.end_reason is not None and self.end_reason not in END_REASONS:
            raise ValueError(f"end_reason must be null or one of {', '.join(END_REASONS)}; got {self.end_reason!r}.")
        taken = sorted((set(KEYS) | {"extra"}) & set(self.extra))
        if taken:
            raise ValueError(f"extra may only add new keys to the run record, got {taken}. Use other names.")

    def to_json(self) -> dict[str, Plain]:
        """Return the content of run.json, the contract's keys first."""
        content = {key: plain(getattr(self, key)) for key in KEYS} | {"metrics": numbers(self.metrics)}
        return content | {key: plain(value) for key, value in self.extra.items()}

    def write(self, run_dir: str | os.PathLike[str]) -> pathlib.Path:
        """Replace `run_dir`'s run.json atomically and return its path. One process writes at a time.

        Raises OSError, naming the file, when the directory is missing, not writable or full; the older record stays.
        """
        path = pathlib.Path(run_dir) / FILE_NAME
        files.write_text(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")
        return path

    @classmethod
    def read(cls, run_dir: str | os.PathLike[str]) -> "RunRecord":
        """Return the record of `run_dir`; raises ValueError if it is damaged or not a record, OSError if unreadable."""
        path = pathlib.Path(run_dir) / FILE_NAME
        advice = "Name another run directory, or move the file away."
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:  # not JSON, or not even UTF-8
            raise ValueError(f"A run record must be JSON; {path} is not ({error}). {advice}") from error
        if not isinstance(content, dict):
            raise ValueError(f"A run record must be a JSON object; {path} holds a {type(content).__name__}. {advice}")
        missing = [key for key in KEYS if key not in content]
        if missing:
            raise ValueError(f"{path} is not a jaxdist run record: it lacks {', '.join(missing)}. {advice}")
        extra = {key: value for key, value in content.items() if key not in KEYS}
        try:
            if wrong := json_kinds.first_misfit(content, _kinds()):
                raise ValueError(f"{wrong}.")
            return cls(**{key: content[key] for key in KEYS}, extra=extra)
        except ValueError as error:
            raise ValueError(f"{path} is not a jaxdist run record: {error} {advice}") from error


def of_run(run_dir: pathlib.Path) -> RunRecord:
    """Return the record of `run_dir`; UserError where it holds none, or none that can be read."""
    if not (run_dir / FILE_NAME).is_file():
        raise errors.UserError(f"A run directory holds {FILE_NAME}; {run_dir} does not. Name another.")
    with errors.as_user_error():
        return RunRecord.read(run_dir)


def readable(run_dir: str | os.PathLike[str]) -> RunRecord | None:
    """Return the record of `run_dir`, None without one that can be read."""
    try:
        return RunRecord.read(run_dir)
    except (OSError, ValueError):
        return None


KEYS = tuple(field.name for field in dataclasses.fields(RunRecord) if field.name != "extra")
"""The top-level keys that every run.json has, in order."""


@functools.cache
def _kinds() -> dict[str, Any]:
    """Return the annotations of the keys of run.json as they are read: the experiment is an object by then."""
    further = get_type_hints(further_keys.FurtherKeys)
    return get_type_hints(RunRecord) | further | {"config": Mapping[str, Any], "extra": Any}


def params_sha256(params: Any) -> str:
    """Return the SHA-256, in hex, over the bytes of the leaves of `params`: in tree order, each in C order.

    Only bytes count, not shapes, dtypes or names. Leaves are fetched whole, one at a time: a sharded leaf is assembled,
    of a replicated leaf the first replica of this process is read (a guard checks that replicas agree).

    Raises ValueError for a leaf with shards on other processes.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        # Flat and as bytes, because hashlib takes neither bfloat16 nor a scalar's buffer.
        digest.update(np.ascontiguousarray(_local_value(path, leaf)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _local_value(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
    value = host_value(leaf)
    if value is None:
        raise ValueError(
            "params_sha256 needs every leaf whole on this process; "
            f"{path_name(path)} is sharded over several ({leaf.sharding}). Replicate the params first, on all "
            "processes: jax.device_put(params, NamedSharding(mesh, PartitionSpec()))."
        )
    return value


def versions() -> dict[str, str | None]:
    """Return the version of Python and of each package that shapes the numbers; None for one that is not installed."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "jaxdist")
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


JAX_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_disable_jit",
    "jax_debug_nans",
)
"""The settings of JAX that change the numbers of a program, or how it is computed."""


def jax_settings() -> dict[str, str]:
    """Return the values of JAX_SETTINGS in this process, as text."""
    return {name: str(jax.config.values.get(name)) for name in JAX_SETTINGS}


@functools.cache
def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


HIDDEN = "***"
_SECRETS = ("password", "secret", "api_key", "access_key", "secret_key", "token", "credentials")
_OF_VOCABULARIES = re.compile(r"(^|[._])(pad|bos|eos|unk|mask|sep|cls|start|end|stop|new|special)_?token$")


def is_secret(name: str) -> bool:
    """Return whether a setting is a secret by its name: its value stays out of the run directory.

    The tokens of a vocabulary, `pad_token` for example, are not secrets.
    """
    return name.lower().endswith(_SECRETS) and not _OF_VOCABULARIES.search(name.lower())


def plain(value: Any) -> Plain:
    """Return `value` as plain JSON data that is equal for equal configurations, in this process or another.

    Dataclasses, Flax Linen modules among them, and named tuples become an object with their class (the key `class`,
    which no field can have) and their fields, those declared `repr=False` left out. Functions, classes and methods
    become their qualified name; a data source with a vocabulary an object with both; any other object becomes the name
    of its class. Arrays become {shape, dtype}; a number that
    is not finite becomes null; a value whose key or field is named like a secret becomes "***".
    """
    match value:
        case None | bool() | str():
            return value
        case enum.Enum():
            return plain(value.value)
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else None
        case np.generic():
            return plain(value.item()) if value.dtype.kind in "biuf" else plain(value.astype(np.float32).item())
        case jax.Array() | np.ndarray():
            return {"shape": list(value.shape), "dtype": str(value.dtype)}
        case np.dtype() | os.PathLike():
            return str(value)
        case functools.partial():
            return {"class": "functools.partial", "func": plain(value.func), "args": plain(value.args)} | {
                "keywords": plain(value.keywords)
            }
        case Mapping():
            return {str(key): _plain_setting(str(key), item) for key, item in value.items()}
        case set() | frozenset():
            return sorted((plain(item) for item in value), key=json.dumps)
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return qualified_name(value)
    return _plain_object(value)


def flat(name: str, value: Any) -> dict[str, Any]:
    """Return plain data with one entry per setting: `{"optimizer.learning_rate": 0.1}`."""
    if not isinstance(value, Mapping):
        return {name: value}
    parts = [flat(f"{name}.{key}" if name else str(key), part) for key, part in value.items()]
    return {key: leaf for part in parts for key, leaf in part.items()}


def differences(name: str, then: Any, now: Any) -> list[str]:
    """Return what differs between two settings as plain data, an entry a setting: `["model.width 64 -> 32"]`."""
    if then == now:
        return []
    if isinstance(then, Mapping) and isinstance(now, Mapping) and then.get("class") == now.get("class"):
        pairs = [(f"{name}.{key}", then.get(key, _UNSET), now.get(key, _UNSET)) for key in {**then, **now}]
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        pairs = [(f"{name}.{index}", *pair) for index, pair in enumerate(zip(then, now, strict=True))]
    else:
        return [f"{name} {_short(then)} -> {_short(now)}"]
    return [found for pair in pairs for found in differences(*pair)]


_UNSET = "not set"
_MOST_CHARACTERS = 60


def _short(value: Any) -> str:
    """Return plain data for a message: the class of an object, shortened where it is long."""
    shown = str(value["class"] if isinstance(value, Mapping) and "class" in value else value)
    return shown if len(shown) <= _MOST_CHARACTERS else f"{shown[: _MOST_CHARACTERS - 3]}..."


def numbers(metrics: Mapping[str, Any]) -> dict[str, Plain]:
    """Return the metrics as JSON numbers: anything that float() accepts; None if not finite."""
    return {
        name: value if value is None or isinstance(value, int) else plain(float(value))
        for name, value in metrics.items()
    }


def _plain_setting(name: str, value: Any) -> Plain:
    number = isinstance(value, bool | None) or (name.lower().endswith("token") and isinstance(value, int | float))
    return HIDDEN if is_secret(name) and not number else plain(value)


def _plain_object(value: Any) -> Plain:
    name = qualified_name(type(value))
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.repr}
        return {"class": name} | {field: _plain_setting(field, found) for field, found in fields.items()}
    if names := getattr(value, "vocabulary", None):  # a data source: what its numbers stand for
        return {"class": name, "vocabulary": plain(names)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"class": name} | {field: plain(getattr(value, field)) for field in value._fields}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return name


def qualified_name(definition: Any) -> str:
    """Return `module.name` of a class or function; a script's module is its file's name, however it was started."""
    module = getattr(definition, "__module__", None) or "builtins"
    if module == "__main__":
        module = pathlib.Path(getattr(sys.modules["__main__"], "__file__", None) or "__main__").stem
    return f"{module}.{definition.__qualname__}"
