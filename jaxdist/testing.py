"""Helpers for tests of distributed code: real processes on this machine, and comparisons of trees.

Fake devices need one line before JAX starts, for example in conftest.py:

    jax.config.update("jax_num_cpu_devices", 8)

`run_processes` runs a function in real processes. The function must be importable: a top-level function of the test
file. Its arguments and results are sent as JSON.

    def count_devices(scale):
        return jax.device_count() * scale

    def test_counts():
        assert testing.run_processes(count_devices, 10, processes=2, devices=2) == [40, 40]
"""

import importlib.util
import inspect
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxdist.launch.joining import runtime
from jaxdist.launch.supervising import local_job
from jaxdist.spmd import keys, layout
from jaxdist.spmd.canonical import thread_pool

PyTree: TypeAlias = Any


class ProcessFailed(AssertionError):
    """A process of `run_processes` failed; the message is the end of that process's output."""


def run_processes(
    function: Callable[..., Any],
    *args: Any,
    processes: int = 2,
    devices: int = 1,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 100.0,
) -> list[Any]:
    """Return the results of `function(*args)` in each of `processes` processes of one JAX job, in their order.

    Args:
      function: a top-level function of an importable file; called after the processes have joined.
      *args: values that JSON can hold.
      processes: number of processes, on the loopback interface.
      devices: number of fake CPU devices of each process.
      environment: set for the processes, in addition to this process's environment.
      timeout_seconds: all processes are ended if they take longer.

    Raises:
      ProcessFailed: one of them failed; the others were ended.
      TimeoutError: they took too long.
    """
    with tempfile.TemporaryDirectory(prefix="jaxdist-") as folder:
        task = {
            "file": inspect.getsourcefile(function),
            "function": function.__qualname__,
            "args": args,
            "devices": devices,
            "results": folder,
            "path": sys.path,
        }
        command = [sys.executable, "-c", "import sys; from jaxdist import testing; testing.run_task(sys.argv[1])"]
        result = local_job.run_job(
            [*command, json.dumps(task)],
            num_processes=processes,
            log_dir=pathlib.Path(folder),
            environment={"JAX_PLATFORMS": "cpu", **(environment or {})},
            timeout_seconds=timeout_seconds,
        )
        if result.failed_process is not None:
            raise ProcessFailed(
                f"Process {result.failed_process} of {processes} failed first (exit status {result.exit_status}). "
                f"Its output ends with:\n{result.message}"
            )
        return [json.loads(_result_path(folder, number).read_text()) for number in range(processes)]


def run_task(text: str) -> None:
    """Run the task of `run_processes` in one of its processes."""
    task = json.loads(text)
    runtime.start(task["devices"], threads=lambda: thread_pool.LEAST)
    spec = importlib.util.spec_from_file_location(pathlib.Path(task["file"]).stem, task["file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(pathlib.Path(task["file"]).parent))
    # The processes can import what the test can.
    sys.path.extend(entry for entry in task["path"] if entry not in sys.path)
    spec.loader.exec_module(module)
    result = getattr(module, task["function"])(*task["args"])
    _result_path(task["results"], jax.process_index()).write_text(json.dumps(result))
    # If a process ended while others still communicate with it, they would fail.
    jax.distributed.shutdown()


def assert_trees_equal(actual: PyTree, expected: PyTree) -> None:
    """Raise AssertionError unless both trees have the same structure, dtypes, shapes and bits; names the leaves."""
    _assert_trees(actual, expected, lambda a, b: a.tobytes() == b.tobytes())


def assert_trees_close(actual: PyTree, expected: PyTree, *, tolerance: float) -> None:
    """Raise AssertionError unless each leaf differs by at most `tolerance`, absolutely; name those that differ more."""
    _assert_trees(actual, expected, lambda a, b: bool(largest_difference(a, b) <= tolerance))


def largest_difference(actual: PyTree, expected: PyTree) -> float:
    """Return the largest absolute difference over all leaves of two trees of the same structure."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max((float(np.max(np.abs(_float(a) - _float(b)), initial=0.0)) for a, b in pairs), default=0.0)


def _assert_trees(actual: PyTree, expected: PyTree, same: Callable[[np.ndarray, np.ndarray], bool]) -> None:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (actual, expected)]
    assert structures[0] == structures[1], f"the trees have different structures: {structures[0]} and {structures[1]}"
    wrong = []
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b, name = _array(a), _array(b), layout.path_name(path) or "the only leaf"
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            wrong.append(f"{name}: {a.dtype}{a.shape} against {b.dtype}{b.shape}")
        elif not same(a, b):
            wrong.append(f"{name}: largest difference {largest_difference(a, b):.3g}")
    assert not wrong, "leaves differ:\n" + "\n".join(wrong)


def _array(leaf: Any) -> np.ndarray:
    return np.asarray(keys.plain(leaf) if isinstance(leaf, jax.Array) else leaf)


def _float(leaf: Any) -> np.ndarray:
    return _array(leaf).astype(np.float64)


def _result_path(folder: str, process: int) -> pathlib.Path:
    return pathlib.Path(folder) / f"result-{process}.json"
