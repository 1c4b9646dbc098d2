"""What a scheduler does for many workers: CPU time of a step and of a join, and the bytes of what it sends.

python benchmarks/parameter_server_scheduler.py [--workers 256] [--servers 16] [--steps N] [--json]

No process is started: the scheduler's state machine is given the messages that workers and servers send, as bytes, and
what it answers is turned into bytes, as its connections do. The log is left out; it costs one fsync a step.
"""

import argparse
import json
import statistics
import time
from typing import Any

from jaxdist.paramserver.protocol import messages, succession, sums
from jaxdist.paramserver.protocol.scheduler.scheduler import Scheduler
from jaxdist.paramserver.protocol.settings import Settings, worker_name
from jaxdist.paramserver.wire import encoding
from jaxdist.rundir import record

METRICS = (messages.Metric("loss", 1.0, 4.0), messages.Metric("accuracy", 1.0, 4.0))


class Play:
    """A scheduler, and the CPU time and bytes that it has cost."""

    def __init__(self, workers: int, servers: int) -> None:
        size = 4 * workers
        self.settings = Settings(
            num_examples=size, global_batch_size=size, max_steps=1 << 40, workers=workers, servers=servers
        )
        self.scheduler = Scheduler(settings=self.settings)
        self.now, self.seconds, self.num_bytes = 0.0, 0.0, 0
        self.last: list[Any] = []

    def tell(self, received: list[messages.Message]) -> list[messages.Message]:
        """Give messages to the scheduler as they arrive; return what it sends."""
        data = [encoding.to_bytes(message) for message in received]
        sent = []
        start = time.thread_time()
        for each in data:
            replies, _ = self.scheduler.handle(encoding.decode(each), self.now)
            self.num_bytes += sum(len(encoding.to_bytes(reply)) for _, reply in replies)
            sent += [reply for _, reply in replies]
        self.seconds += time.thread_time() - start
        return sent

    def tick(self) -> None:
        """Let time pass: workers that registered become members."""
        start = time.thread_time()
        replies, _ = self.scheduler.handle(messages.Tick(), self.now)
        self.num_bytes += sum(len(encoding.to_bytes(reply)) for _, reply in replies)
        self.seconds += time.thread_time() - start

    def join(self) -> list[messages.Grant]:
        """Let all processes join and ask; return what the workers are granted."""
        servers, state = succession.server_names(self.settings), self.scheduler.state
        self.tell([messages.Register(name, 1) for name in servers])
        self.tell([messages.Register(worker_name(number), 1) for number in range(self.settings.workers)])
        self.now += 0.1
        self.tick()
        assert state.membership is not None
        self.tell(
            [
                messages.MembershipAck(number, place.primary, 1, state.term, 0, 0, ())
                for number, place in enumerate(state.membership.shards)
            ]
        )
        asks = [messages.Ask(number, worker.incarnation, 0) for number, worker in state.workers.items()]
        return [each for each in self.tell(asks) if isinstance(each, messages.Grant)]

    def step(self, grants: list[messages.Grant]) -> list[messages.Grant]:
        """Let all workers push what they were granted; return the grants of the next step."""
        told: list[messages.Message] = [
            messages.Done(g.worker, g.incarnation, g.sequence, g.clock, g.lease, 4.0, True, METRICS, staged=False)
            for g in grants
        ]
        pushes = [messages.Contributor(g.worker, g.incarnation, g.sequence, g.lease) for g in grants]
        fingerprint = sums.fingerprint(sorted(pushes, key=lambda push: push.lease.slice))
        servers, step = range(self.settings.servers), grants[0].lease.step
        told += [messages.Staged(shard, step, fingerprint) for shard in servers]
        sent = self.tell(told)
        commits = [each for each in sent if isinstance(each, messages.Commit)]
        assert len(commits) == self.settings.servers
        self.tell([messages.CommitAck(shard, commits[0].step, 1.0) for shard in servers])
        return [each for each in sent if isinstance(each, messages.Grant)]


def measure(workers: int, servers: int, steps: int) -> list[dict[str, Any]]:
    """Return the rows of a join and of a step."""
    play = Play(workers, servers)
    grants = play.join()
    assert len(grants) == workers
    joined = row("join", workers, servers, 1000 * play.seconds, "ms", 1) | {"bytes": play.num_bytes}
    times = []
    for _ in range(steps):
        play.seconds, play.num_bytes = 0.0, 0
        grants = play.step(grants)
        times.append(1000 * play.seconds)
    made = row("a step", workers, servers, statistics.median(times), "ms", steps) | {"bytes": play.num_bytes}
    return [joined, made]


def row(name: str, workers: int, servers: int, value: float, unit: str, repeats: int) -> dict[str, Any]:
    what = f"scheduler, {workers} workers, {servers} servers: {name}"
    return {"name": what, "ours": value, "unit": unit, "repeats": repeats, "versions": record.versions()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--servers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    for found in measure(options.workers, options.servers, options.steps):
        if options.json:
            print(json.dumps(found), flush=True)
        else:
            print(f"{found['name']:50} {found['ours']:9.2f} {found['unit']}, {found['bytes']:,} bytes sent", flush=True)


if __name__ == "__main__":
    main()
