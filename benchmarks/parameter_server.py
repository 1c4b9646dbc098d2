"""Push and pull of 64 MiB between one worker and one server, beside a raw socket and a memory copy.

python benchmarks/parameter_server.py [--rounds N] [--json]

Worker and server are two processes. Ours is the production code: the server's state machine behind the wire,
pushes that carry their place in the exactly-once table, checksums of all arrays verified on both ends. The raw socket
sends the same bytes both ways and does nothing with them; the memory copy copies them once from array to array. All
take turns in one run. A rate is (bytes pushed + bytes pulled) / seconds, for the copy the bytes copied / seconds.

The cost of the exactly-once bookkeeping is measured against a server without any: it adds a push to the params and
answers, over the same wire.
"""

import argparse
import json
import pathlib
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxdist.paramserver.processes.driver import Driver
from jaxdist.paramserver.processes.process_world import ProcessWorld
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.protocol.server import Server
from jaxdist.paramserver.protocol.settings import Settings, server_name, worker_name
from jaxdist.paramserver.protocol.shard import Shard
from jaxdist.paramserver.run.sharding import BLOCK_BYTES
from jaxdist.paramserver.wire.streams import Wire, reuse_freed_memory

NUM_BYTES = 64 << 20
BLOCKS = tuple(np.zeros(BLOCK_BYTES // 4, np.float32) for _ in range(NUM_BYTES // BLOCK_BYTES))
LEASE = messages.Lease(0, 0, 0, 0, 1)
SERVER, WORKER = server_name(0, 0), worker_name(0)
SETTINGS = Settings(num_examples=1, global_batch_size=1, max_steps=1 << 40, mode="async")


class Replace:
    """The cheapest optimizer: the new params are the gradient."""

    needs_norm = False
    num_params = 1 << 30

    def init(self, params: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """Return no state."""
        return ()

    def update(self, params: Any, opt_state: Any, grads: Any, **_: Any) -> tuple[Any, Any]:
        """Return the gradient."""
        return grads, opt_state


class WithoutBooks:
    """Checks a push, takes its mean and answers, as a server does, and keeps nothing but the params.

    It has no members, terms, table of applied pushes, log, clocks or fingerprint: a push that comes twice would be
    applied twice.
    """

    def __init__(self) -> None:
        self.shard = make_shard()

    def handle(self, message: messages.Message, now: float) -> tuple[list[effects.Send], list[effects.Effect]]:
        """Answer a push or a pull."""
        out = effects.Output()
        if isinstance(message, messages.Push):
            assert not self.shard.complaint(message)
            count = np.float32(message.count)
            self.shard.params = tuple((piece / count).astype(piece.dtype) for piece in message.pieces)
            out.send(WORKER, messages.PushAck(0, 0, 1, message.sequence, "applied"))
        elif isinstance(message, messages.Pull):
            out.send(WORKER, messages.Pulled(0, 0, 1, message.sequence, message.version, self.shard.params))
        elif isinstance(message, messages.StopRun):
            out.do(effects.Exit(0, ""))
        return out.replies, out.effects


def make_shard() -> Shard:
    return Shard(shard=0, settings=SETTINGS, updater=Replace(), params=BLOCKS)


def make_server() -> Server:
    """Return a server that is primary of the only shard, with one member."""
    server = Server(name=SERVER, boot=1, settings=SETTINGS, make_shard=make_shard)
    place = messages.ShardPlace(SERVER, 1, "", 0, False)
    server.handle(messages.Membership(1, (messages.Member(0, 1, 0),), (place,), 1, ""), 0.0)
    return server


def serve(kind: str, peer: str) -> None:
    """Be the server process: print the port, then serve until told to stop."""
    reuse_freed_memory()
    world = ProcessWorld(pathlib.Path())
    driver = Driver(make_server() if kind == "ours" else WithoutBooks(), world)
    wire = Wire(listen="127.0.0.1:0", peers={WORKER: peer}, receive=world.receive)
    print(wire.port, flush=True)
    world.run(driver, wire)
    wire.close()


def echo() -> None:
    """Be the other end of the raw socket: receive so many bytes, then send as many."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    connection, _ = listener.accept()
    buffer = bytearray(NUM_BYTES)
    while receive_all(connection, buffer):
        connection.sendall(buffer)


def receive_all(connection: socket.socket, buffer: bytearray) -> bool:
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True


class Served:
    """One worker and its server process."""

    def __init__(self, kind: str) -> None:
        self.answer: Any = None
        self.heard = threading.Event()
        self.wire = Wire(listen="127.0.0.1:0", peers={}, receive=self._hear)
        self.child = start("--serve", kind, f"127.0.0.1:{self.wire.port}")
        self.wire.peers[SERVER] = f"127.0.0.1:{read_port(self.child)}"
        self.sequence = 0
        self.grads = tuple(np.random.default_rng(1).normal(size=block.shape).astype(np.float32) for block in BLOCKS)

    def _hear(self, message: messages.Message, handled: Callable[[], None]) -> None:
        handled()
        if isinstance(message, messages.PushAck | messages.Pulled):
            self.answer = message
            self.heard.set()

    def _ask(self, message: messages.Message) -> Any:
        self.heard.clear()
        self.wire.send(SERVER, message)
        assert self.heard.wait(60), "no answer"
        return self.answer

    def run(self) -> None:
        """Push and pull once."""
        self.sequence += 1
        push = messages.Push(0, 0, 1, self.sequence, 0, self.sequence, LEASE, 1.0, 1.0, True, 1.0, self.grads)
        assert self._ask(push).status == "applied"
        pulled = self._ask(messages.Pull(0, 0, 1, self.sequence, 0, 0))
        assert pulled.pieces[0][0] == self.grads[0][0]

    def close(self) -> None:
        """End."""
        self.wire.send(SERVER, messages.StopRun(0, ""))
        self.child.wait(30)
        self.wire.close()


class RawSocket:
    """The same bytes through a TCP connection, and nothing else."""

    def __init__(self) -> None:
        self.child = start("--echo")
        self.connection = socket.create_connection(("127.0.0.1", read_port(self.child)))
        self.sent, self.received = bytes(NUM_BYTES), bytearray(NUM_BYTES)

    def run(self) -> None:
        """Send and receive once."""
        self.connection.sendall(self.sent)
        receive_all(self.connection, self.received)

    def close(self) -> None:
        """End."""
        self.connection.close()
        self.child.wait(30)


class Copy:
    """The bytes of a push, copied from one array to another, once for the push and once for the pull."""

    def __init__(self) -> None:
        self.source, self.target = np.ones(NUM_BYTES, np.uint8), np.zeros(NUM_BYTES, np.uint8)

    def run(self) -> None:
        """Copy twice."""
        for _ in range(2):
            np.copyto(self.target, self.source)

    def close(self) -> None:
        """Nothing to end."""


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)


def read_port(child: subprocess.Popen[str]) -> int:
    assert child.stdout is not None
    return int(child.stdout.readline())


def seconds(work: Callable[[], None]) -> float:
    start_time = time.perf_counter()
    work()
    return time.perf_counter() - start_time


def measure(num_rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every round of every side; they take turns, the first round is thrown away."""
    sides = {"ours": Served("ours"), "no books": Served("no books"), "socket": RawSocket(), "copy": Copy()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    try:
        for _ in range(num_rounds + 1):
            for name, side in sides.items():
                times[name].append(seconds(side.run))
    finally:
        for side in sides.values():
            side.close()
    return {name: found[1:] for name, found in times.items()}


def compare(name: str, ours: list[float], theirs: list[float], num_bytes: int = 2 * NUM_BYTES) -> dict[str, Any]:
    """Return a row of GB/s; the ratio is the median over the rounds."""
    return {
        "name": name,
        "ours": num_bytes / statistics.median(ours) / 1e9,
        "theirs": num_bytes / statistics.median(theirs) / 1e9,
        "ratio": statistics.median(b / a for a, b in zip(ours, theirs)),
        "unit": "GB/s",
        "repeats": len(ours),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "numpy": np.__version__}


def show(row: dict[str, Any], limit: float, as_json: bool) -> None:
    if as_json:
        print(json.dumps(row), flush=True)
        return
    verdict = "" if row["ratio"] >= limit else "  MISSED"
    print(
        f"{row['name']:36} {row['ours']:8.3f} {row['theirs']:8.3f} {row['unit']}   ratio {row['ratio']:.3f}, "
        f"at least {limit:.3f}{verdict}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--echo", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
    elif options.echo:
        echo()
    else:
        reuse_freed_memory()
        times = measure(options.rounds)
        show(compare("push + pull / memory copy", times["ours"], times["copy"]), 1 / 4, options.json)
        show(compare("push + pull / raw socket", times["ours"], times["socket"]), 0.0, options.json)
        show(compare("with the books / without", times["ours"], times["no books"]), 0.9, options.json)


if __name__ == "__main__":
    main()
