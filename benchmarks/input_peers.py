"""JPEGs in files and in shards beside SPDL, LitData, WebDataset and tf.data: images a second, CPU and memory.

python benchmarks/input_peers.py --peers PYTHON [--json] [--repeats N] [--batches N] [--only files shards] [--data DIR]

PYTHON is an interpreter with spdl, litdata, webdataset, tensorflow-cpu, torch and simplejpeg. Each side runs in a
process of its own, see `input_peer_sides.py`; they take turns, and are halted between them. Medians are compared. The
pictures are made in DIR, or in a folder that is removed.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import input
import input_peer_sides

PACKAGES = ("spdl", "litdata", "webdataset", "tensorflow-cpu", "torch", "simplejpeg")
WORKS = {
    work: [name for name in input_peer_sides.SIDES if name.split(",")[0].endswith(f" {work}")]
    for work in ("files", "shards")
}
"""The sides of each work, ours first."""


def compare(work: str, peers: str, folder: pathlib.Path, num_batches: int, repeats: int) -> Iterator[dict]:
    """Yield a row for each side beside our first."""
    with contextlib.ExitStack() as stack:
        sides = []
        for name in WORKS[work]:
            python = sys.executable if name.startswith("ours") else peers
            side = input.Side(python, name, folder, script="input_peer_sides.py")
            stack.callback(side.close)
            side.read(2 * num_batches)  # imports, writes its own kind of shard, fills buffers
            sides.append(side)
        for _ in range(repeats):
            for side in sides:
                side.turns.append(side.read(num_batches))
        ours, *others = sides
        for side in others:
            row = input.result(f"JPEG {side.name}", ours.median("rate"), side.median("rate"), "images/s", repeats)
            yield row | {
                "cpu_seconds_per_1000": [ours.median("cpu"), side.median("cpu")],
                "memory_mb": [ours.median("memory_mb"), side.median("memory_mb")],
            }


def versions_of(python: str) -> dict[str, str]:
    """Return the versions of the others' packages."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {PACKAGES}}}))"
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True, metavar="PYTHON")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=48, help="batches of 64 a turn")
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="of the pictures, which are made once")
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, input.end)
    versions = versions_of(options.peers) | {"load before": f"{os.getloadavg()[0]:.1f}"}
    with contextlib.ExitStack() as stack:
        folder = options.data or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "tar").exists():
            input.make_data(folder)
            input_peer_sides.write_tars(folder)
        for work in options.only:
            for row in compare(work, options.peers, folder, options.batches, options.repeats):
                print(json.dumps(row | {"versions": versions}) if options.json else input.as_text(row), flush=True)


if __name__ == "__main__":
    main()
