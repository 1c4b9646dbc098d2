"""What the protocol costs a step: real processes and connections, a gradient that takes no time, no JAX.

python benchmarks/parameter_server_steps.py [--workers 1 2 4 8] [--steps N] [--bytes B] [--replicated] [--json]

A scheduler, one server (or a server and its backup) and the workers are processes of this machine. A worker pushes
arrays that it has made once, in blocks as in a run; the server adds them and makes the cheapest update. What counts is
the median time between two commits to which all workers contributed, and the CPU time that all processes together use
for a step.
"""

import argparse
import json
import multiprocessing
import pathlib
import resource
import statistics
import tempfile
import time
from typing import Any

import numpy as np

from jaxdist.launch.supervising import local_job
from jaxdist.paramserver.processes.driver import Driver
from jaxdist.paramserver.processes.process_world import Log, ProcessWorld
from jaxdist.paramserver.protocol import effects, journal, messages, succession
from jaxdist.paramserver.protocol.scheduler.scheduler import Scheduler
from jaxdist.paramserver.protocol.server import Server
from jaxdist.paramserver.protocol.settings import SCHEDULER, Settings, server_shard, worker_name, worker_number
from jaxdist.paramserver.protocol.shard import Shard
from jaxdist.paramserver.protocol.worker import Worker
from jaxdist.paramserver.run.sharding import BLOCK_BYTES
from jaxdist.paramserver.wire.security import Security
from jaxdist.paramserver.wire.streams import Wire, reuse_freed_memory
from jaxdist.rundir import record

_WARM = 10
TOKEN = Security(token="benchmark")


class Add:
    """The cheapest optimizer that depends on its gradient."""

    needs_norm = False
    num_params = 1 << 30

    def init(self, params: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """Return no state."""
        return ()

    def update(self, params: Any, opt_state: Any, grads: Any, **_: Any) -> tuple[Any, Any]:
        """Return params minus gradient."""
        return tuple(param - grad for param, grad in zip(params, grads)), opt_state


class Judged(Scheduler):
    """Is its own observer: the run may end as soon as it is asked to."""

    def handle(self, message: messages.Message, now: float) -> Any:
        """Answer an offer of a cut with a verdict."""
        replies, todo = super().handle(message, now)
        offers = (reply for _, reply in replies if isinstance(reply, messages.Offer))
        return replies, [*todo, *(effects.Continue(messages.Verdict(o.term, o.number, o.end_reason)) for o in offers)]


def settings_of(workers: int, replicated: bool) -> Settings:
    return Settings(
        num_examples=64 * workers,
        global_batch_size=64 * workers,
        max_steps=1 << 40,
        workers=workers,
        durability="replicated" if replicated else "none",
    )


def play(name: str, peers: dict[str, str], settings: Settings, steps: int, num_bytes: int, folder: str) -> None:
    """Be the process `name`; write how much CPU time it used, and, as the scheduler, the time of each step."""
    reuse_freed_memory()
    times: list[float] = []
    gaps: list[float] = []

    def observe(effect: effects.Effect) -> None:
        if isinstance(effect, effects.Append) and isinstance(effect.record, journal.CommitRecord):
            times.append(time.perf_counter())
            if len(times) > _WARM and len({c.worker for c in effect.record.contributors}) == settings.workers:
                gaps.append(times[-1] - times[-2])
            if len(gaps) == steps:
                world.receive(messages.Halt("measured"))

    sizes = [min(BLOCK_BYTES, num_bytes - start) // 4 for start in range(0, num_bytes, BLOCK_BYTES)]
    blocks = tuple(np.zeros(size, np.float32) for size in sizes)
    grads = tuple(np.full(size, 1e-3, np.float32) for size in sizes)
    log, gradient = None, None
    if name == SCHEDULER:
        machine: Any = Judged(settings=settings)
        log = Log(pathlib.Path(folder, "log"), outlives_machine=False)
    elif (shard := server_shard(name)) is not None:
        machine = Server(
            name=name,
            boot=1,
            settings=settings,
            make_shard=lambda: Shard(shard=shard, settings=settings, updater=Add(), params=blocks),
        )
    else:
        machine = Worker(worker=worker_number(name) or 0, boot=1, settings=settings)

        def gradient(compute: effects.Compute) -> messages.Computed:
            return messages.Computed(compute.incarnation, compute.sequence, 64.0, 64.0, True, 1.0, (grads,), ())

    world = ProcessWorld(pathlib.Path(folder), log=log, gradient=gradient)
    driver = Driver(machine, world, observe=observe)
    wire = Wire(
        listen=peers[name], peers=peers, receive=world.receive, security=TOKEN, receive_small=world.receive_small
    )
    world.run(driver, wire)
    wire.flush(5.0)
    wire.close()
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {"cpu": used.ru_utime + used.ru_stime, "gaps": gaps, "steps": len(times)}
    pathlib.Path(folder, name.replace("/", "-") + ".json").write_text(json.dumps(found))


def measure(workers: int, steps: int, num_bytes: int, replicated: bool) -> dict[str, Any]:
    """Run once; return milliseconds a step: median and CPU."""
    settings = settings_of(workers, replicated)
    names = [SCHEDULER, *succession.server_names(settings), *map(worker_name, range(workers))]
    peers = {name: f"127.0.0.1:{port}" for name, port in zip(names, local_job.quiet_ports(len(names)))}
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        common = (peers, settings, steps, num_bytes, folder)
        children = [context.Process(target=play, args=(name, *common)) for name in names]
        for child in children:
            child.start()
        for child in children:
            child.join(300)
            if child.exitcode != 0:
                raise SystemExit(f"A process ended with {child.exitcode}.")
        found = [json.loads(path.read_text()) for path in pathlib.Path(folder).glob("*.json")]
    gaps = next(each["gaps"] for each in found if each["gaps"])
    num_steps = max(each["steps"] for each in found)
    copies = ", replicated" if replicated else ""
    return {
        "name": f"protocol alone, {num_bytes / 1e6:g} MB, {workers} workers{copies}",
        "ours": 1000 * statistics.median(gaps),
        "unit": "ms/step",
        "cpu": 1000 * sum(each["cpu"] for each in found) / num_steps,
        "repeats": len(gaps),
        "versions": record.versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bytes", type=int, default=100_000)
    parser.add_argument("--replicated", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    for workers in options.workers:
        row = measure(workers, options.steps, options.bytes, options.replicated)
        if options.json:
            print(json.dumps(row), flush=True)
        else:
            print(f"{row['name']:50} {row['ours']:8.2f} ms/step, CPU {row['cpu']:8.2f} ms/step", flush=True)


if __name__ == "__main__":
    main()
