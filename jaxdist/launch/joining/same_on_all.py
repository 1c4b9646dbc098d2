"""Compares the processes of a job at the start, when a difference can still be reported: all must run the same.

Later it would appear as a hang in a collective, or not at all. The facts are exchanged through the coordinator's store,
since collectives depend on what is compared. Each process writes its facts once; process 0 compares them.
"""

import collections
import functools
import hashlib
import json
import os
import pathlib
import platform
import re
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from jaxdist.errors import TryAgain, UserError
from jaxdist.rundir import record
from jaxdist.spmd import jax_private

_PACKAGE = pathlib.Path(__file__).parents[2]
_SECONDS = 3600.0
"""How long to wait for a process that loads its data; one that dies is noticed by its missing heartbeat."""
_HOST = "host"
_INSTRUCTIONS = {
    "AVX2 with FMA": {"avx2", "fma"},
    "AVX": {"avx"},
    "SSE4.2": {"sse4_2"},
    "SVE": {"sve"},
    "NEON": {"asimd"},
}
"""Name -> the CPU features that Linux reports for it, newest first."""
_MOST_NAMED = 8


def compare(name: str, facts: Mapping[str, Any], *, timeout_seconds: float = _SECONDS) -> None:
    """Return if all processes of the job have the same facts; every process calls this once for each name.

    Raises:
      UserError: they differ; the message, the same on every process, names the processes and the differences.
      TryAgain: a process did not report its facts in time.
    """
    client, process, count = _job()
    if client is None:
        return
    client.key_value_set(_key(name, process), json.dumps({_HOST: socket.gethostname(), **facts}))
    if process == 0:
        told = [json.loads(_get(client, name, number, timeout_seconds)) for number in range(count)]
        client.key_value_set(_key(name, "verdict"), describe(told))
    verdict = _get(client, name, "verdict", timeout_seconds)
    if verdict:
        raise UserError(verdict)


def from_first(name: str, value: str) -> str:
    """Return the value of process 0 on every process; each process calls this once for each name."""
    client, process, _ = _job()
    if client is None:
        return value
    if process == 0:
        client.key_value_set(_key(name, "first"), value)
    return _get(client, name, "first", _SECONDS)


def all_of(name: str, value: bool) -> bool:
    """Return whether `value` is true on every process; each process calls this once for each name."""
    client, process, count = _job()
    if client is None:
        return value
    client.key_value_set(_key(name, process), str(value))
    if process == 0:
        told = [_get(client, name, number, _SECONDS) for number in range(count)]
        client.key_value_set(_key(name, "all"), str(all(each == str(True) for each in told)))
    return _get(client, name, "all", _SECONDS) == str(True)


def largest_common(name: str, values: Collection[int]) -> int | None:
    """Return the largest number that every process has, None without one; each calls this once for each name."""
    client, process, count = _job()
    if client is None:
        return max(values, default=None)
    client.key_value_set(_key(name, process), json.dumps(sorted(values)))
    told = [json.loads(_get(client, name, number, _SECONDS)) for number in range(count)]
    return max(set.intersection(*map(set, told)), default=None)


def describe(told: Sequence[Mapping[str, Any]]) -> str:
    """Return which processes differ from the others and in what, "" if none does; `told[n]` are the facts of process n.

    The most frequent value counts as right, or that of process 0 if there are several.
    """
    lines = []
    for name in sorted({name for facts in told for name in facts} - {_HOST}):
        values = [json.dumps(facts.get(name)) for facts in told]
        usual = max(values, key=lambda value: (values.count(value), value == values[0]))
        deviant = collections.defaultdict(list)
        for number, value in enumerate(values):
            if value != usual:
                deviant[value].append(number)
        lines += [
            f"  {name}: {_people(numbers, told)} {'has' if len(numbers) == 1 else 'have'} {value}, the others {usual}"
            for value, numbers in deviant.items()
        ]
    if not lines:
        return ""
    more = [f"  ... and {len(lines) - _MOST_NAMED} more"] if len(lines) > _MOST_NAMED else []
    rule = "All processes of a job must run the same; these differ. Make them equal and start again."
    return "\n".join([rule, *lines[:_MOST_NAMED], *more])


def look_ahead() -> None:
    """Look at the code that is imported, once for all processes that are forked from this one: they run that code.

    Each would take 25 ms for it, when a job starts again all at the same time.
    """
    _hashes(_PACKAGE)
    _without_links(_loaded())


def of_start(num_devices: int | None) -> dict[str, Any]:
    """Return what must be equal before any computation: versions, code, number of devices, and settings of JAX."""
    return {
        "--devices": num_devices,
        "JAX_PLATFORMS": jax.config.values.get("jax_platforms"),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS"),
        **{f"version of {name}": version for name, version in record.versions().items()},
        **record.jax_settings(),
        **_hashes(_PACKAGE),
    }


def instructions(cpuinfo: str | None = None, machine: str | None = None) -> str:
    """Return the kind of instructions that XLA compiles to on this machine's CPU; other kinds give other bits.

    AVX2 stands for AVX-512 too: small programs give the same bits on both.
    """
    text = pathlib.Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
    machine = platform.machine() if machine is None else machine
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    features = set(match[1].split()) if match else set()
    newest = next((name for name, needed in _INSTRUCTIONS.items() if needed <= features), "none of these")
    return f"{machine}, {newest}"


def of_experiment(config: Any, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Return the facts of an experiment: each setting, and the hashes of its files (see `files_of`)."""
    settings = {f"setting {name}": value for name, value in record.flat("", config).items()}
    return settings | {f"file {name}": found for name, found in hashes.items()}


def files_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the hashes of an experiment's file and of loaded files beside it, by their names in its folder."""
    folder = os.path.join(os.path.dirname(os.path.realpath(path)), "")
    loaded = {os.path.realpath(path), *_without_links(_loaded())}
    beside = sorted(pathlib.Path(file) for file in loaded if file.startswith(folder))
    # A module need not have the file that it names: torch.classes says _classes.py, wherever the run is started.
    found = [file for file in beside if file.suffix == ".py" and "site-packages" not in file.parts and file.is_file()]
    return {str(file.relative_to(folder)): _hash(file) for file in found}


def _loaded() -> list[str]:
    """Return the files of the modules of this process."""
    here = os.getcwd()
    files = [file for module in [*sys.modules.values()] if (file := getattr(module, "__file__", None))]
    return [os.path.join(here, file) for file in files]


def _without_links(files: Sequence[str]) -> set[str]:
    """Return absolute paths without symbolic links, each looked at once: a process has loaded 1,600 modules."""
    return {_without_link(file) for file in files}


@functools.cache
def _without_link(file: str) -> str:
    if os.path.islink(file):
        return os.path.realpath(file)
    return os.path.join(_without_link_folder(os.path.dirname(file)), os.path.basename(file))


_without_link_folder = functools.cache(os.path.realpath)


@functools.cache
def _hashes(folder: pathlib.Path) -> dict[str, str]:
    return {f"file {path.relative_to(folder.parent)}": _hash(path) for path in sorted(folder.rglob("*.py"))}


def _hash(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _people(numbers: Sequence[int], told: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"process {number} ({told[number].get(_HOST)})" for number in numbers)


def _job() -> tuple[Any, int, int]:
    """Return the store of the coordinator (None outside a job), this process's number, and how many there are."""
    return jax_private.coordinator_store(), *jax_private.process_of_job()


def _key(name: str, part: object) -> str:
    return f"jaxdist/{name}/{part}"


def _get(client: Any, name: str, part: object, seconds: float) -> str:
    try:
        return client.blocking_key_value_get(_key(name, part), int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        who = part if isinstance(part, int) else 0
        raise TryAgain(
            f"Process {who} did not report its {name} within {seconds:g} s, or the coordinator is gone. Look at the "
            "output of that process, and start the job again."
        ) from error
