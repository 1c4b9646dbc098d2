"""jaxdist beside a plain Flax loop, torch (DDP with gloo) and Keras 3 on JAX: speed at equal loss, start, memory.

python benchmarks/peers.py [--only mlp cnn gpt recovery] [--devices 1 2] [--sides ...] [--rounds N] [--starts N]
    [--seconds S] [--kills N] [--peers PYTHON] [--json]

The same MLP, CNN and byte GPT from the same first weights, with Adam on the same batches in the same order. Each side
is what its users write: `jaxdist train` with an experiment file and default settings (metrics, checkpoints and guards
included), with mean and with canonical reduction; a jitted Flax step in a for loop; torch modules in a for loop, in
DistributedDataParallel on two processes; `keras.Model.fit`. On n devices a JAX side has one process with n fake
devices, torch n processes. All sides of a work are started, then they train in turns of equally many steps in a random
order, one at a time; a round's ratio is that of its turns, medians are shown. `loss` is that of the first batch after
the same number of steps; a side whose loss is not that of the others is marked OTHER.

Start is from the start of the command to the end of the first step, with empty caches. Memory is the largest
proportional set size of all processes of a side, seen after a turn. `recovery` kills a training process with SIGKILL:
`jaxdist train` on two processes, and DDP under torchrun with a checkpoint each step, and counts the seconds to the next
new step; a plain loop and Keras end.

--peers names the interpreter with torch and keras, by default this one; sides that it lacks are left out and named.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import random
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

from jaxdist.rundir import record

HERE = pathlib.Path(__file__).resolve().parent
SIDES = HERE / "peer_sides"
sys.path.insert(0, str(SIDES))

from turns import PIPES, STEPS  # noqa: E402 (a script's own folder)
from works import FOLDER, WORK, WORKS, make_arrays, make_weights  # noqa: E402

LOSS_TOLERANCE = 0.02
KILL_AFTER_STEPS = 40
WARM_STEPS = 20
PATIENCE_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Side:
    """A way to train, on a number of devices."""

    name: str
    devices: int

    @property
    def ours(self) -> bool:
        """Whether it is jaxdist's."""
        return self.name.startswith("jaxdist")

    def __str__(self) -> str:
        return f"{self.name}, {self.devices} device{'s' * (self.devices > 1)}"


NAMES = ("jaxdist", "jaxdist canonical", "flax", "torch", "keras")


def command(side: Side, peers: str, folder: pathlib.Path) -> list[str]:
    """Return what starts a side."""
    if side.ours:
        reduction = "canonical" if "canonical" in side.name else "mean"
        train = [sys.executable, "-m", "jaxdist.cli", "train", str(SIDES / "jaxdist_side.py"), "--reduction", reduction]
        return [*train, "--devices", str(side.devices), "--run-dir", str(folder / f"run-{time.monotonic_ns()}")]
    python = sys.executable if side.name == "flax" else peers
    return [python, str(SIDES / f"{side.name}_side.py"), str(side.devices)]


class Running:
    """A side's processes, between their first step and their end."""

    def __init__(self, side: Side, work: str, peers: str, folder: pathlib.Path):
        pipes = [folder / f"{kind}-{time.monotonic_ns()}" for kind in ("orders", "answers")]
        for pipe in pipes:
            os.mkfifo(pipe)
        # Open for both: opening must not wait for the other end.
        self._orders, self._answers = (os.open(pipe, os.O_RDWR) for pipe in pipes)
        flags = f"--xla_force_host_platform_device_count={side.devices}" if side.name in ("flax", "keras") else ""
        own = {PIPES: os.pathsep.join(map(str, pipes)), FOLDER: str(folder), WORK: work, "PEER_PORT": str(free_port())}
        own |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "KERAS_BACKEND": "jax"}
        own |= {"PYTHONPATH": os.pathsep.join([str(SIDES), str(HERE.parent)]), "PYTHONDONTWRITEBYTECODE": "1"}
        self.log = folder / f"log-{time.monotonic_ns()}"
        start = time.perf_counter()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command(side, peers, folder),
                env=os.environ | own,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.memory_mb = 0.0
        self.answer()
        self.start_seconds = time.perf_counter() - start

    def answer(self) -> dict[str, float]:
        """Return the side's next message."""
        end, text = time.monotonic() + PATIENCE_SECONDS, b""
        while not text.endswith(b"\n"):
            if select.select([self._answers], [], [], 0.2)[0]:
                text += os.read(self._answers, 4096)
            elif self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"A side ended or hung: {self.process.args}\n{self.log.read_text()[-3000:]}")
        return json.loads(text)

    def turn(self, num_steps: int) -> float:
        """Train; return the seconds it took."""
        os.write(self._orders, f"{num_steps}\n".encode())
        seconds = self.answer()["seconds"]
        self.memory_mb = max(self.memory_mb, memory_mb(self.process.pid))
        return seconds

    def loss(self) -> float:
        """Return the loss on the first batch, and end the side."""
        os.write(self._orders, b"\n")
        loss = self.answer()["loss"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        return loss

    def close(self) -> None:
        """End its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._orders)
        os.close(self._answers)


def free_port() -> int:
    """Return a port that was free."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def memory_mb(session: int) -> float:
    """Return the proportional set size of the processes of a session and their descendants, in MB."""
    parents = {}
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parents[int(entry)] = int(pathlib.Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
    family, kilobytes = [session], 0
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
        with contextlib.suppress(OSError):
            lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kilobytes / 1024


def prepare(work: str, folder: pathlib.Path) -> None:
    """Write what all sides read."""
    weights = make_weights(work)
    np.savez(folder / "arrays.npz", **make_arrays(work))
    np.savez(folder / "weights.npz", **weights)
    np.savez(folder / "named_weights.npz", **{f"params/{name}": array for name, array in weights.items()})


@contextlib.contextmanager
def started(sides: list[Side], work: str, options: argparse.Namespace) -> Iterator[dict[Side, Running]]:
    """Start the sides of a work, one after the other; end them."""
    running: dict[Side, Running] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(work, pathlib.Path(folder))
        try:
            for side in sides:
                running[side] = Running(side, work, options.peers, pathlib.Path(folder))
            yield running
        finally:
            for each in running.values():
                each.close()


def start_seconds(side: Side, work: str, options: argparse.Namespace) -> float:
    """Return the median time from the command to the end of the first step."""
    taken = []
    for _ in range(options.starts):
        with started([side], work, options) as running:
            running[side].loss()
            taken.append(running[side].start_seconds)
    return statistics.median(taken)


def measure(work: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each side of a work."""
    sides = [Side(name, devices) for devices in options.devices for name in options.sides]
    sides = [side for side in sides if side.devices > 1 or side.name != "jaxdist canonical"]
    units = WORKS[work].batch_size * WORKS[work].units
    rates: dict[Side, list[float]] = {side: [] for side in sides}
    with started(sides, work, options) as running:
        slowest = max(each.turn(WARM_STEPS) for each in running.values()) / WARM_STEPS
        num_steps = max(5, round(options.seconds / slowest))
        order = random.Random(0)
        for _ in range(options.rounds):
            for side in order.sample(sides, len(sides)):
                rates[side].append(num_steps * units / running[side].turn(num_steps))
        losses = {side: each.loss() for side, each in running.items()}
        memory = {side: each.memory_mb for side, each in running.items()}
    usual = statistics.median(losses.values())
    for side in sides:
        beside = [other for other in sides if other.devices == side.devices and other.name == "jaxdist"]
        ratios = [ours / each for ours, each in zip(rates[beside[0]], rates[side])] if beside else []
        yield {
            "name": f"{work}: {side}",
            "ours": round(statistics.median(rates[beside[0]]), 1) if beside else None,
            "theirs": round(statistics.median(rates[side]), 1),
            "ratio": round(statistics.median(ratios), 3) if ratios else None,
            "unit": "tokens/s" if WORKS[work].units > 1 else "examples/s",
            "repeats": options.rounds,
            "loss": losses[side],
            "equal_loss": abs(losses[side] - usual) <= LOSS_TOLERANCE * max(usual, 0.1),
            "steps": 1 + WARM_STEPS + options.rounds * num_steps,
            "start_seconds": round(start_seconds(side, work, options), 2) if options.starts else None,
            "memory_mb": round(memory[side]),
        }


def recovery(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for jaxdist beside torchrun: seconds from the death of a process to the next new step."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={options.kills}"]
    train = [sys.executable, "-m", "jaxdist.cli", "train", str(SIDES / "jaxdist_side.py"), "--processes", "2"]
    for work in [name for name in options.only if name in WORKS] or ["cnn"]:
        waits = {}
        for name in ("jaxdist", *(["torch"] if "torch" in options.sides else [])):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                prepare(work, pathlib.Path(folder))
                ours = [*train, "--run-dir", f"{folder}/run"]
                line = ours if name == "jaxdist" else [options.peers, *torchrun, str(SIDES / "torch_side.py")]
                waits[name] = waits_after_kills(line, work, pathlib.Path(folder), options.kills)
        theirs = statistics.median(waits["torch"]) if "torch" in waits else None
        yield {
            "name": f"{work}: SIGKILL to the next step, 2 processes, jaxdist / torchrun",
            "ours": round(statistics.median(waits["jaxdist"]), 2),
            "theirs": theirs and round(theirs, 2),
            "ratio": theirs and round(statistics.median(waits["jaxdist"]) / theirs, 3),
            "unit": "s",
            "repeats": options.kills,
        }


def waits_after_kills(line: list[str], work: str, folder: pathlib.Path, kills: int) -> list[float]:
    """Kill the process that writes down the steps, again and again; return the seconds until each next new step."""
    own = {STEPS: str(folder / "steps"), FOLDER: str(folder), WORK: work, "JAX_PLATFORMS": "cpu"}
    own |= {"PYTHONPATH": os.pathsep.join([str(SIDES), str(HERE.parent)]), "PYTHONDONTWRITEBYTECODE": "1"}
    (folder / "steps").touch()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(line, env=os.environ | own, stdout=log, stderr=log, start_new_session=True)
    waits, step = [], 0
    try:
        with (folder / "steps").open() as lines:
            for _ in range(kills):
                step, _, pid = next_step(lines, process, step + KILL_AFTER_STEPS, folder / "log")
                os.kill(pid, signal.SIGKILL)
                killed = time.time()
                step = newest(lines, step)
                step, when, _ = next_step(lines, process, step + 1, folder / "log")
                waits.append(when - killed)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return waits


def newest(lines: TextIO, step: int) -> int:
    """Return the newest step that the killed process had written."""
    return max([step, *(int(line.split()[0]) for line in lines.readlines())])


def next_step(lines: TextIO, process: subprocess.Popen[bytes], step: int, log: pathlib.Path) -> tuple[int, float, int]:
    """Wait for that step or a later one; return it, when it ended and the process that wrote it."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        if line := lines.readline():
            number, when, pid = line.split()
            if int(number) >= step:
                return int(number), float(when), int(pid)
        elif process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"A side ended or hung: {process.args}\n{log.read_text()[-3000:]}")
        else:
            time.sleep(0.005)


def missing(peers: str) -> list[str]:
    """Return the sides that the interpreter of the peers lacks a package for."""
    return [
        name
        for name in ("torch", "keras")
        if subprocess.run(
            [peers, "-c", f"import {name}"], env=os.environ | {"KERAS_BACKEND": "jax"}, capture_output=True
        ).returncode
    ]


def show(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    if row["unit"] == "s":
        return f"{row['name']}: {row['ours']} s, {row['theirs']} s, ratio {row['ratio']}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:8.3f}"
    start = "" if row["start_seconds"] is None else f"{row['start_seconds']:7.1f}"
    loss = f"{row['loss']:9.4f}{'' if row['equal_loss'] else ' OTHER'}"
    return f"{row['name']:36}{row['theirs']:11.0f} {row['unit']:10}{ratio:8}{loss}{start:7}{row['memory_mb']:7}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*WORKS, "recovery"], default=[*WORKS, "recovery"])
    parser.add_argument("--sides", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--kills", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=2.0, help="of the slowest side's turn")
    parser.add_argument("--peers", default=sys.executable, help="an interpreter with torch and keras")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the sides are ended, too
    for name in missing(options.peers):
        print(f"{name} is not installed for {options.peers}: left out.", file=sys.stderr)
        options.sides = [side for side in options.sides if side != name]
    if not options.json:
        print(f"{'':36}{'rate':>11} {'':10}{'ours /':>8}{'loss':>9}{'start':>7}{'MB':>7}")
    for work in options.only:
        for row in recovery(options) if work == "recovery" else measure(work, options):
            row |= {"versions": record.versions(), "machine": f"{os.cpu_count()} cores, {platform.machine()}"}
            print(json.dumps(row) if options.json else show(row), flush=True)


if __name__ == "__main__":
    main()
