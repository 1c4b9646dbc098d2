"""The processes of a run on a Ray cluster: one actor for each starts it and ends with it, and Ray restarts the actor.

The run directory must be on a file system that all nodes share. An actor stays on its node, so that its address stays
valid. A node that is lost permanently ends the run, and `--resume` continues without it.
"""

import os
import pathlib
import socket
import subprocess
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxdist import extras
from jaxdist.errors import ExitStatus, RunFailedError
from jaxdist.paramserver.processes import crew, run_folder
from jaxdist.paramserver.protocol.settings import SCHEDULER, worker_number
from jaxdist.paramserver.wire import security

_STARTS = "starts"
_PLACING_SECONDS = 60.0


class Part:
    """The actor that runs one process."""

    def address(self, host: str) -> str:
        """Return `host` with a port that is free on it."""
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def run(self, name: str, directory: str, environment: dict[str, str]) -> int:
        """Run the process to its end. If it fails, this actor exits too: Ray starts another, and calls this again."""
        folder = pathlib.Path(directory)
        with (folder / _STARTS / name.replace("/", "-")).open("a") as starts:
            starts.write("1")
        with crew.log_path(folder, name).open("ab") as log:
            everything = {**os.environ, **environment, **crew.environment(name, environment[security.TOKEN])}
            status = subprocess.call(crew.command(name, folder), env=everything, stdout=log, stderr=log)
        if status:
            os._exit(ExitStatus.FAILED)
        return status


class RayCrew:
    """See `crew.Crew`. Places the processes when it is created; `peers` holds their addresses.

    Args:
      names: names of the processes.
      directory: folder of the run.
      environment: environment variables of the processes, with the secret of the run.
      devices: accelerators of each worker, if the cluster has any.

    Raises:
      UserError: Ray is not installed.
      ValueError: there is no running cluster.
    """

    def __init__(
        self, names: Sequence[str], directory: pathlib.Path, environment: dict[str, str], *, devices: int
    ) -> None:
        self._ray: Any = extras.require("ray", extra="ray")
        self.names, self.directory, self._environment = list(names), directory, environment
        self._seen: Counter[str] = Counter()
        try:
            self._ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False)
        except ConnectionError as error:
            raise ValueError(
                f"ps.engine=ray needs a running Ray cluster; none was found: {error}. Start one with "
                "`ray start --head`, or set RAY_ADDRESS."
            ) from error
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        places = {name: nodes[number % len(nodes)] for number, name in enumerate(self.names)}
        self._actors = {name: self._make_actor(name, node, devices) for name, node in places.items()}
        asked = [self._actors[name].address.remote(node["NodeManagerAddress"]) for name, node in places.items()]
        self.peers = dict(zip(self.names, self._ray.get(asked, timeout=_PLACING_SECONDS), strict=True))
        self._runs: dict[str, Any] = {}

    def _make_actor(self, name: str, node: dict[str, Any], devices: int) -> Any:
        stay = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        gpus = devices if worker_number(name) is not None and node["Resources"].get("GPU") else 0
        actor = self._ray.remote(Part)
        settings = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": -1}
        return actor.options(scheduling_strategy=stay, **settings).remote()

    @property
    def restarts(self) -> int:
        """How many times processes were restarted."""
        return sum(max(count - 1, 0) for count in self._starts().values())

    def _starts(self) -> Counter[str]:
        return Counter({path.name: path.stat().st_size for path in (self.directory / _STARTS).glob("*")})

    def start(self) -> None:
        """Start all processes."""
        for folder in (self.directory / _STARTS, self.directory / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        for path in (self.directory / _STARTS).iterdir():
            path.unlink()
        for name, actor in self._actors.items():
            self._runs[name] = actor.run.remote(name, str(self.directory.absolute()), self._environment)

    def look_after(self) -> dict[str, int]:
        """Raise RunFailedError for a process that dies repeatedly, for a lost node, or if the scheduler ended.

        Ray restarts the others and does not say so: the result is empty, and their silence shows it.
        """
        for name, actor in self._actors.items():
            if run_folder.take_silent(self.directory, name):
                self._ray.kill(actor, no_restart=False)
        ended = {ref: name for name, ref in self._runs.items()}
        for ref in self._ray.wait(list(ended), num_returns=len(ended), timeout=0)[0]:
            try:
                self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                raise RunFailedError(f"Ray could not keep {ended[ref]} running: {error}") from error
            if ended[ref] == SCHEDULER:
                raise RunFailedError(f"The scheduler ended the run.\n{crew.log_tail(self.directory, SCHEDULER)}")
        for name, count in (self._starts() - self._seen).items():
            if count > crew.MOST_DEATHS + 1:
                tail = crew.log_tail(self.directory, name)
                raise RunFailedError(f"{name} died {count - 1} times without a step in between.\n{tail}")
        return {}

    def progressed(self) -> None:
        """Note that the run made progress: deaths are counted from zero again."""
        self._seen = self._starts()

    def close(self, *, orderly: bool) -> None:
        """End all processes; `orderly` gives them time to exit by themselves."""
        if orderly and self._runs:
            self._ray.wait(list(self._runs.values()), num_returns=len(self._runs), timeout=crew.GRACE_SECONDS)
        actors, self._actors, self._runs = self._actors, {}, {}
        for actor in actors.values():  # their processes die with them (die_with_parent)
            self._ray.kill(actor, no_restart=True)
        self._ray.shutdown()
