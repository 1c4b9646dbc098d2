"""Ray: the processes of a job on an existing Ray cluster, one actor each.

An actor only starts a process, passes on its output and signals to it, and reports how it ended; training is in the
process, which joins the others by the JAX_ variables as on any other engine. A job that ends with status 75, or loses
an actor with its node, is restarted.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdist.errors import ExitStatus, UserError
from jaxdist.launch.engines.request import Request
from jaxdist.launch.joining import coordinator

KNOWN = ("address", "cpus", "gpus", "restarts")
_PLACING_SECONDS = 60
_ANSWER_SECONDS = 5.0
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 20.0
# It dies with its actor: Ray ends actors with SIGKILL.
_START = "from jaxdist.launch import parent; parent.die_with_parent({}); from jaxdist.cli import main; main.main()"


class ProcessActor:
    """One process of the job; it is in an actor with two threads, so that it can be asked to stop while it runs."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def place(self) -> tuple[str, int]:
        """Return the address of this node and a port that is free on it."""
        import ray

        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1]

    def run(self, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run `jaxdist ARGUMENTS` to its end; return its exit status. Ray passes on its output."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *arguments],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(line, end="", flush=True)
        return self._process.wait()

    def stop(self, number: int) -> None:
        """Send a signal to the process, if it runs."""
        if self._process is not None:
            self._process.send_signal(number)


def describe(request: Request) -> str:
    """Return what `run` would start, for people."""
    settings = request.only("Ray", KNOWN)
    bundle = ", ".join(f"{count:g} {kind}" for kind, count in _bundle(request).items())
    return (
        f"Ray cluster {settings.get('address', 'auto')}: {request.hosts} bundles ({bundle}), each on a node of its "
        f"own, {request.processes} processes in each:\n  jaxdist {' '.join(request.train())}"
    )


def run(request: Request, *, say: Callable[[str], None]) -> int:
    """Run the job to its end; return the exit status that a job of one process would have.

    Raises:
      UserError: Ray is not installed, there is no cluster, or it is too small.
    """
    settings = request.only("Ray", KNOWN)
    ray = _connect(settings.get("address", "auto"))
    stops: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, frame: stops.append(number)) for number in numbers}
    try:
        group = _reserve(ray, request)
        for restart in range(request.whole("restarts", 10) + 1):
            status = _attempt(ray, request, group, stops)
            if status != ExitStatus.RETRY or stops:
                break
            say(f"The job ended with status {status}; it is restarted (attempt {restart + 2}).")
        ray.util.remove_placement_group(group)
        return status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        ray.shutdown()


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs the package ray: pip install 'jaxdist[ray]'.") from error
    try:
        if ":" in address and "://" not in address:  # Ray would wait for minutes
            socket.create_connection(coordinator.split(address), timeout=_ANSWER_SECONDS).close()
        ray.init(address=address, logging_level="ERROR")
    except OSError as error:  # ConnectionError among it
        raise UserError(
            f"--engine ray needs a running Ray cluster; none is found at {address!r}. Start one (ray start --head), "
            "or name another with --with address=HOST:PORT."
        ) from error
    return ray


def _bundle(request: Request) -> dict[str, float]:
    kinds = {"cpus": "CPU", "gpus": "GPU"}
    wanted = {"cpus": 1, **{name: request.whole(name, 1) for name in kinds if name in request.settings}}
    return {kinds[name]: float(count * request.processes) for name, count in wanted.items() if count}


def _reserve(ray: Any, request: Request) -> Any:
    group = ray.util.placement_group([_bundle(request)] * request.hosts, strategy="STRICT_SPREAD")
    try:
        ray.get(group.ready(), timeout=_PLACING_SECONDS)
    except ray.exceptions.GetTimeoutError as error:
        ray.util.remove_placement_group(group)
        raise UserError(
            f"The job needs {request.hosts} nodes with {_bundle(request)} free on each; the Ray cluster did not have "
            f"them within {_PLACING_SECONDS} s. It has {ray.cluster_resources()}. Ask for fewer, or add nodes."
        ) from error
    return group


def _attempt(ray: Any, request: Request, group: Any, stops: list[int]) -> int:
    """Run the processes once; return the status of the job."""
    per_process = {kind: count / request.processes for kind, count in _bundle(request).items()}
    members = []
    for number in range(request.hosts * request.processes):
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=number // request.processes
        )
        actor = ray.remote(ProcessActor).options(
            num_cpus=per_process.get("CPU", 0),
            num_gpus=per_process.get("GPU", 0),
            scheduling_strategy=strategy,
            max_concurrency=2,
        )
        members.append(actor.remote())
    try:
        address, port = ray.get(members[0].place.remote())
        shared = {"JAX_COORDINATOR_ADDRESS": f"{address}:{port}", "JAX_NUM_PROCESSES": str(len(members))}
        runs = [
            member.run.remote(request.train(), {**shared, "JAX_PROCESS_ID": str(number)})
            for number, member in enumerate(members)
        ]
        return _watch(ray, members, runs, stops)
    except ray.exceptions.RayActorError:
        return ExitStatus.RETRY
    finally:
        for member in members:
            ray.kill(member)


def _watch(ray: Any, members: Sequence[Any], runs: Sequence[Any], stops: list[int]) -> int:
    """Return the status of the job, the first that is neither 0 nor 75, else the largest; pass on signals."""
    waiting, passed_on, statuses = list(runs), 0, []
    deadline = float("inf")
    while waiting and time.monotonic() < deadline:
        ended, waiting = ray.wait(waiting, timeout=_POLL_SECONDS)
        statuses += ray.get(ended)
        failed = [status for status in statuses if status not in (0, ExitStatus.RETRY)]
        if failed:
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if ExitStatus.RETRY in statuses:
            # A process that hangs never ends by itself.
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        for number in stops[passed_on:]:
            ray.get([member.stop.remote(number) for member in members])
            passed_on += 1
    return max(statuses, default=ExitStatus.RETRY)
