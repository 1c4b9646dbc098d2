"""The experiments that state a target, each trained until it reaches it: images, sound, tables.

python benchmarks/cases.py [--only NAME ...] [--devices N] [--json]

Each is one `jaxdist train` in a process of its own, timed with imports and compiling. `ours` is the
held-out metric at the end, `theirs` the target. The exit status is 1 if one ends without its target.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"
CASES = {
    "digits_cnn": "images: 1,437 digits of 8 x 8",
    "digits_resnet": "images: the same, shifted at random",
    "tones_cnn": "sound: 600 WAV files of half a second",
    "breast_cancer": "a table: CSV, 427 rows of 30 numbers",
    "diabetes": "a table: Parquet, 332 rows, regression",
    "bpe_gpt": "text: 1,024 tokens of a BPE",
}


def main() -> int:
    """Run the cases, print a row for each, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [measure(name, options.devices) for name in options.only]
    for row in rows:
        print(json.dumps(row) if options.json else line(row))
    return int(any(row["end_reason"] != "target_reached" for row in rows))


def measure(name: str, num_devices: int) -> dict[str, Any]:
    """Return the row of a case."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jaxdist.cli", "train", str(EXPERIMENTS / f"{name}.py"), "--json"]
        start = time.monotonic()
        done = subprocess.run(
            [*command, "--devices", str(num_devices), "--run-dir", f"{folder}/run"], stdout=subprocess.PIPE, check=True
        )
        seconds = time.monotonic() - start
    made = json.loads(done.stdout)
    stop = made["config"]["stop"]
    reached = made["metrics"][stop["target_metric"]]
    return {
        "name": name,
        "ours": round(reached, 4),
        "theirs": stop["target"],
        "ratio": round(reached / stop["target"], 4),
        "unit": stop["target_metric"],
        "repeats": 1,
        "versions": made["versions"],
        "end_reason": made["end_reason"],
        "step": made["step"],
        "seconds": round(seconds, 1),
    }


def line(row: dict[str, Any]) -> str:
    """Return a row for people."""
    words = f"{row['name']:14} {CASES[row['name']]:38} {row['unit']} {row['ours']:.4f} of {row['theirs']}"
    missed = "" if row["end_reason"] == "target_reached" else "   MISSED"
    return f"{words}  {row['step']:5} steps {row['seconds']:6.1f} s{missed}"


if __name__ == "__main__":
    sys.exit(main())
