"""The processes of a run on a Ray cluster: one actor for each starts it and ends with it, and Ray restarts the actor.

The run directory must be on a file system that all nodes share. An actor stays on its node, so that its address stays
valid. When a node is lost, its actors are made again on the nodes that are left.
"""

import os
import pathlib
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxdist import extras
from jaxdist.errors import ExitStatus, RunFailedError, say
from jaxdist.paramserver.processes import crew, peer_addresses, run_folder
from jaxdist.paramserver.processes.process_world import write_file
from jaxdist.paramserver.processes.role import LEFT_STATUS
from jaxdist.paramserver.protocol.settings import SCHEDULER, worker_number
from jaxdist.paramserver.wire import security

_STARTS, _RETIRING = "starts", "retiring"
_LOOK_SECONDS = 0.2
_PLACING_SECONDS = 180.0


class Part:
    """The actor that runs one process."""

    def address(self, host: str) -> str:
        """Return `host` with a port that is free on it."""
        return peer_addresses.free_addresses(host, 1)[0]

    def run(self, name: str, directory: str, environment: dict[str, str]) -> int:
        """Run the process to its end. If it fails, this actor exits too: Ray starts another, and calls this again."""
        folder = pathlib.Path(directory)
        with (folder / _STARTS / name.replace("/", "-")).open("a") as starts:
            starts.write("1")
        with crew.log_path(folder, name).open("ab") as log:
            everything = {**os.environ, **environment, **crew.environment(name, environment[security.TOKEN])}
            child = subprocess.Popen(crew.command(name, folder), env=everything, stdout=log, stderr=log)
            while (status := child.poll()) is None:
                if (folder / _RETIRING / name.replace("/", "-")).exists():
                    child.terminate()
                time.sleep(_LOOK_SECONDS)
        if status and status != LEFT_STATUS:
            os._exit(ExitStatus.FAILED)
        return status


def connect() -> Any:
    """Return Ray, connected to its cluster.

    Raises:
      UserError: Ray is not installed.
      ValueError: there is no running cluster.
    """
    ray: Any = extras.require("ray", extra="ray")
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, ignore_reinit_error=True)
    except ConnectionError as error:
        raise ValueError(
            f"ps.engine=ray needs a running Ray cluster; none was found: {error}. Start one with "
            "`ray start --head`, or set RAY_ADDRESS."
        ) from error
    return ray


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
      RunFailedError: its nodes take no processes.
    """

    def __init__(
        self, names: Sequence[str], directory: pathlib.Path, environment: dict[str, str], *, devices: int
    ) -> None:
        self._ray = connect()
        self.names, self.directory, self._environment = list(names), directory, environment
        self._devices, self._seen = devices, Counter[str]()
        self._left: list[str] = []
        self._moves: Counter[str] = Counter()
        self._actors: dict[str, Any] = {}
        self._runs: dict[str, Any] = {}
        try:
            self.peers = self._make_actors(self.names)
        except BaseException:
            self.close(orderly=False)
            raise

    def own_address(self) -> str:
        """Return an address of this process at which the actors reach it."""
        return peer_addresses.free_addresses(self._ray.util.get_node_ip_address(), 1)[0]

    def _make_actors(self, names: Sequence[str]) -> dict[str, str]:
        """Make the actors of these processes on the nodes that are alive, in turn; return their addresses."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        places = {name: nodes[number % len(nodes)] for number, name in enumerate(names)}
        self._actors |= {name: self._make_actor(name, node, self._devices) for name, node in places.items()}
        asked = [self._actors[name].address.remote(node["NodeManagerAddress"]) for name, node in places.items()]
        try:
            return dict(zip(names, self._ray.get(asked, timeout=_PLACING_SECONDS), strict=True))
        except self._ray.exceptions.RayError as error:  # also GetTimeoutError
            raise RunFailedError(f"Ray could not place {', '.join(names)} on its nodes: {error}") from error

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
        self._run(list(self._actors))

    def _run(self, names: Sequence[str]) -> None:
        for name in names:
            directory = str(self.directory.absolute())
            self._runs[name] = self._actors[name].run.remote(name, directory, self._environment)

    def look_after(self) -> dict[str, int]:
        """See Crew; the result has the processes of lost nodes, which are placed again.

        Ray restarts the others and does not say so: their silence shows it.
        """
        died = {}
        for name, actor in self._actors.items():
            if run_folder.take_silent(self.directory, name):
                self._ray.kill(actor, no_restart=False)
        ended = {ref: name for name, ref in self._runs.items()}
        for ref in self._ray.wait(list(ended), num_returns=len(ended), timeout=0)[0]:
            try:
                status = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                died[ended[ref]] = run_folder.last_boot(self.directory, ended[ref])
                self._note_lost(ended[ref], error)
                continue
            if status == LEFT_STATUS:
                self._forget(ended[ref])
            elif ended[ref] == SCHEDULER:
                raise crew.end_by_scheduler(self.directory)
        for name, count in (self._starts() - self._seen).items():
            if count > crew.MOST_DEATHS + 1:
                tail = crew.log_tail(self.directory, name)
                raise RunFailedError(f"{name} died {count - 1} times without a step in between.\n{tail}")
        self._place_again(list(died))
        return died

    def _note_lost(self, name: str, error: Exception) -> None:
        """Note that Ray cannot restart a process where it was; RunFailedError if that happens again and again."""
        self._moves[name] += 1
        if self._moves[name] > crew.MOST_DEATHS:
            raise RunFailedError(f"Ray could not keep {name} running: {error}") from error

    def _place_again(self, names: Sequence[str]) -> None:
        """Run processes whose node was lost on the nodes that are left."""
        if not names:
            return
        for name, address in self._make_actors(names).items():
            peer_addresses.announce(self.directory, name, address)
        self._run(names)
        say(f"A node of the cluster is lost. Its processes run on the others from now on: {', '.join(names)}.")

    def _forget(self, name: str) -> None:
        """Note that a worker has left."""
        del self._runs[name], self._actors[name]
        self.names.remove(name)
        self._left.append(name)

    def retire(self, names: Sequence[str]) -> None:
        """See Crew."""
        for name in names:
            write_file(self.directory / _RETIRING / name.replace("/", "-"), [b""])

    def take_left(self) -> list[str]:
        """See Crew."""
        found, self._left = self._left, []
        return found

    def progressed(self) -> None:
        """Note that the run made progress: deaths are counted from zero again."""
        self._seen = self._starts()
        self._moves.clear()

    def close(self, *, orderly: bool) -> None:
        """End all processes; `orderly` gives them time to exit by themselves."""
        if orderly and self._runs:
            self._ray.wait(list(self._runs.values()), num_returns=len(self._runs), timeout=crew.GRACE_SECONDS)
        actors, self._actors, self._runs = self._actors, {}, {}
        for actor in actors.values():  # their processes die with them (die_with_parent)
            self._ray.kill(actor, no_restart=True)
        self._ray.shutdown()
