"""The input pipeline compared with others: throughput, CPU time and memory, and what a stop and a resize lose.

python benchmarks/input.py [--json] [--repeats N] [--only WORK...]

The others (tf.data, Grain, torch, torchdata) are installed by this script into an environment of their own, in
--peers DIR. Each side runs in a process of its own; they take turns, and medians are compared. The sides are defined in
`input_sides.py`, the stop and the resize in `input_resume.py`.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator

import numpy as np

HERE = pathlib.Path(__file__).parent
PEERS = ["tensorflow-cpu==2.21.0", "torch==2.13.0", "torchdata==0.11.0", "grain==0.2.18", "simplejpeg==1.9.0"]
NUM_JPEGS, NUM_TOKENS = 1024, 2**25
_GRACE_SECONDS = 20.0

WORKS = {
    "jpeg": ("images/s", 96, "ours jpeg", ["tf.data jpeg", "torch jpeg", "grain jpeg, 2 threads of batches",
                                         "grain jpeg, 16 threads", "grain jpeg, 2 workers", "ours jpeg, 2 threads"]),
    "tokens": ("tokens/s", 1000, "ours tokens", ["torch tokens", "grain tokens"]),
    "elements": ("elements/s", 1000, "ours elements", ["torch elements"]),
}  # fmt: skip
"""Unit, batches a turn, our side, their sides."""


class Side:
    """A process that reads batches on request."""

    def __init__(self, python: str, name: str, folder: pathlib.Path, script: str = "input_sides.py"):
        command = [python, str(HERE / script), name, str(folder)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            process_group=0,
        )
        self.name, self.turns = name, []

    def read(self, num_batches: int) -> dict[str, float]:
        """Let the side read some batches; return what they took.

        Between its turns the side is halted with all its workers: it must neither disturb the others nor read ahead.
        """
        os.killpg(self._process.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{num_batches}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self.name} failed:\n{self._log.read()[-2000:]}")
        os.killpg(self._process.pid, signal.SIGSTOP)
        return json.loads(line)

    def median(self, what: str) -> float:
        """Return the median rate, CPU seconds per 1,000 units, or the most memory in MB."""
        if what == "rate":
            return statistics.median(turn["units"] / turn["seconds"] for turn in self.turns)
        if what == "cpu":
            return statistics.median(1000 * turn["cpu"] / turn["units"] for turn in self.turns)
        return max(turn[what] for turn in self.turns)

    def close(self) -> None:
        """End the process: by itself if it can, so that it removes what it has in shared memory."""
        os.killpg(self._process.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # the group is empty
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


def make_data(folder: pathlib.Path) -> None:
    """Write pictures that compress like photographs, tokens, and 28 x 28 elements."""
    import simplejpeg
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(NUM_JPEGS):
        path = folder / "jpeg" / str(number % 8) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).resize(
            (256, 256), Image.Resampling.BICUBIC
        )
        noisy = np.clip(np.asarray(coarse) + random.normal(0, 6, (256, 256, 3)), 0, 255).astype(np.uint8)
        path.write_bytes(simplejpeg.encode_jpeg(noisy, quality=85, colorsubsampling="420"))
    (folder / "tokens").mkdir()
    np.save(folder / "tokens" / "tokens.npy", random.integers(0, 50_000, NUM_TOKENS, np.uint16))
    (folder / "elements").mkdir()
    np.save(folder / "elements" / "images.npy", random.integers(0, 255, (60_000, 28, 28), np.uint8))
    np.save(folder / "elements" / "labels.npy", random.integers(0, 10, 60_000, np.int32))


def make_peers(folder: pathlib.Path) -> str:
    """Return the Python of the others' environment, which is made on first use."""
    python = folder / "bin" / "python"
    marker = folder / "installed.json"
    if not marker.exists() or json.loads(marker.read_text()) != PEERS:
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
        marker.write_text(json.dumps(PEERS))
    return str(python)


def compare(work: str, peers: str, folder: pathlib.Path, repeats: int) -> Iterator[dict]:
    unit, num_batches, ours_name, their_names = WORKS[work]
    with contextlib.ExitStack() as stack:
        names = [ours_name, *their_names]
        sides = [Side(sys.executable if name.startswith("ours") else peers, name, folder) for name in names]
        for side in sides:
            stack.callback(side.close)
            side.read(2 * num_batches)  # imports, compiles, fills buffers
        for _ in range(repeats):
            for side in sides:
                side.turns.append(side.read(num_batches))
        ours, *theirs = sides
        for side in theirs:
            yield result(f"{work}: {side.name}", ours.median("rate"), side.median("rate"), unit, repeats) | {
                "cpu_seconds_per_1000": [ours.median("cpu"), side.median("cpu")],
                "memory_mb": [ours.median("memory_mb"), side.median("memory_mb")],
                "written_mb": [ours.median("written_mb"), side.median("written_mb")],
            }


def time_order(repeats: int) -> Iterator[dict]:
    from jaxdist.data import order

    scheme, count = order.Shuffled(), 1024
    times = []
    for number in range(max(repeats, 5) * 20):
        start = time.perf_counter()
        scheme(1_281_167, 0, 0, number * count, (number + 1) * count)
        times.append(1e6 * (time.perf_counter() - start) / count)
    yield result(
        "order, 1,024 ids at a time", statistics.median(times), 0.5, "microseconds/id (theirs: limit)", repeats
    )
    times = []
    for number in range(max(repeats, 5) * 20):
        position = (number * 7_919_777_111) % 10**12
        start = time.perf_counter()
        scheme(10**12, 0, 0, position, position + 1)
        times.append(1e6 * (time.perf_counter() - start))
    yield result("order, seek in 1e12", statistics.median(times), 1000, "microseconds (theirs: limit)", repeats)


def resume(python: str, peer: str) -> dict:
    """Return how many examples are repeated and lost by a run that stops on 4 hosts and continues on 2."""
    command = [python, str(HERE / "input_resume.py"), peer]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def end_to_end(repeats: int) -> dict:
    """Time the digits' step fed by the pipeline, and fed with batches that are on the devices already."""
    import jax

    from jaxdist.config import loading
    from jaxdist.run import components

    trained = components.put_together(
        loading.load_experiment(str(HERE.parent / "experiments" / "digits_cnn.py")), devices=jax.devices()[:1]
    )
    state, num_steps = trained.create_state(), 40
    kept = [batch for batch, _ in (lambda it: [next(it) for _ in range(8)])(trained.batches())]
    fed = trained.batches()
    seconds: dict[str, list[float]] = {"fed": [], "kept": []}
    for turn in range(-1, repeats):
        for name in seconds:
            jax.block_until_ready(state)
            start = time.perf_counter()
            for number in range(num_steps):
                batch = next(fed)[0] if name == "fed" else kept[number % len(kept)]
                state, _ = trained.step(state, batch)
            jax.block_until_ready(state)
            if turn >= 0:
                seconds[name].append((time.perf_counter() - start) / num_steps)
    fed.close()
    rates = {name: 1 / statistics.median(times) for name, times in seconds.items()}
    return result("digits CNN, fed / from device memory", rates["fed"], rates["kept"], "steps/s", repeats)


def result(name: str, ours: float, theirs: float, unit: str, repeats: int) -> dict:
    return {
        "name": name,
        "ours": ours,
        "theirs": theirs,
        "ratio": ours / theirs if theirs else None,
        "unit": unit,
        "repeats": repeats,
    }


def end(number: int, frame: object) -> None:
    """Exit normally, which ends the halted sides; the default action of a signal would leave them, and so would a
    second signal meanwhile (`timeout` sends two).
    """
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--only", nargs="+", choices=[*WORKS, "order", "resume", "end-to-end"], help="some of the works"
    )
    parser.add_argument(
        "--peers", type=pathlib.Path, default=pathlib.Path.home() / ".cache" / "jaxdist" / "benchmark-peers"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, end)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "numpy", "simplejpeg")}
    versions |= dict(peer.split("==") for peer in PEERS if "simplejpeg" not in peer) | {
        "python": platform.python_version()
    }
    versions |= {"cpus": str(os.cpu_count()), "load before": f"{os.getloadavg()[0]:.1f}"}
    for row in measure(options):
        print(json.dumps(row | {"versions": versions}) if options.json else as_text(row), flush=True)


def measure(options: argparse.Namespace) -> Iterator[dict]:
    wanted = options.only or [*WORKS, "order", "resume", "end-to-end"]
    peers = make_peers(options.peers) if {*WORKS, "resume"} & set(wanted) else ""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if set(WORKS) & set(wanted):
            make_data(folder)
        for work in wanted:
            if work in WORKS:
                yield from compare(work, peers, folder, options.repeats)
            elif work == "order":
                yield from time_order(options.repeats)
            elif work == "end-to-end":
                yield end_to_end(options.repeats)
            else:
                ours = resume(sys.executable, "ours")
                for peer in ("grain", "torchdata"):
                    theirs = resume(peers, peer)
                    for what in ("repeated", "lost"):
                        yield result(
                            f"{what} examples, 4 hosts then 2: {peer}", ours[what], theirs[what], "examples", 1
                        )


def as_text(row: dict) -> str:
    ratio = "" if row["ratio"] is None else f"{row['ratio']:8.2f}x"
    text = f"{row['name']:48} {row['ours']:14,.2f} {row['theirs']:14,.2f} {ratio:9} {row['unit']}"
    if "memory_mb" in row:
        cpu, memory = row["cpu_seconds_per_1000"], row["memory_mb"]
        text += f"   cpu s/1000: {cpu[0]:.4f}, {cpu[1]:.4f}   memory MB: {memory[0]:.0f}, {memory[1]:.0f}"
    return text


if __name__ == "__main__":
    main()
