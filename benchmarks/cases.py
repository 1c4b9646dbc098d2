"""The experiments that state a target, each trained until it reaches it: images, sound, tables, text.

python benchmarks/cases.py [--only NAME ...] [--devices N] [--json] [--docs]

Each is one `jaxdist train` in a process of its own, timed with imports and compiling. `ours` is the
held-out metric at the end, `theirs` the target. The exit status is 1 if one ends without its target. `--docs` writes
the rows into the table of docs/guide/cases.md.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENTS, PAGE = ROOT / "experiments", ROOT / "docs" / "guide" / "cases.md"
HEAD = "| experiment | reached | target | steps | seconds |"
NAMES = {"eval/accuracy": "accuracy", "eval/r2": "R2", "eval/bits_per_byte": "bits a byte"}
CASES = {
    "digits_cnn": "images: 1,437 digits of 8 x 8",
    "digits_resnet": "images: the same, shifted at random",
    "tones_cnn": "sound: 600 WAV files of half a second",
    "breast_cancer": "a table: CSV, 427 rows of 30 numbers",
    "diabetes": "a table: Parquet, 332 rows, regression",
    "bytes_gpt": "text: bytes",
    "bpe_gpt": "text: 1,024 tokens of a BPE",
}


def main() -> int:
    """Run the cases, print a row for each, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--docs", action="store_true", help="write the rows into docs/guide/cases.md")
    options = parser.parse_args()
    rows = []
    for name in options.only:
        rows.append(measure(name, options.devices))
        print(json.dumps(rows[-1]) if options.json else line(rows[-1]), flush=True)
    if options.docs:
        PAGE.write_text(with_rows(PAGE.read_text(), rows))
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


def with_rows(page: str, rows: list[dict[str, Any]]) -> str:
    """Return the page with these rows in its table, in place of those of the same experiments."""
    before, _, after = page.partition(HEAD + "\n")
    table, gap, rest = after.partition("\n\n")
    kept = {entry.split("`")[1].removesuffix(".py"): entry for entry in table.splitlines()[1:]}
    kept |= {row["name"]: as_entry(row) for row in rows}
    return (
        before
        + "\n".join([HEAD, "|---|---|---|---|---|", *(kept[name] for name in CASES if name in kept)])
        + gap
        + rest
    )


def as_entry(row: dict[str, Any]) -> str:
    """Return a row of the page's table."""
    metric = NAMES.get(row["unit"], row["unit"])
    in_words = [f"{row['ours']:.2f} {metric}", f"at most {row['theirs']}"]
    reached, target = (
        in_words if row["unit"].endswith("bits_per_byte") else [f"{metric} {row['ours']:.3f}", row["theirs"]]
    )
    target = f"{target}, not reached" if row["end_reason"] != "target_reached" else target
    return f"| `{row['name']}.py` | {reached} | {target} | {row['step']} | {row['seconds']:.0f} |"


def line(row: dict[str, Any]) -> str:
    """Return a row for people."""
    words = f"{row['name']:14} {CASES[row['name']]:38} {row['unit']} {row['ours']:.4f} of {row['theirs']}"
    missed = "" if row["end_reason"] == "target_reached" else "   MISSED"
    return f"{words}  {row['step']:5} steps {row['seconds']:6.1f} s{missed}"


if __name__ == "__main__":
    sys.exit(main())
