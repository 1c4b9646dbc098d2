"""CSV files to the first batch, beside pandas; Parquet rows in shuffled order, beside pyarrow's own row access.

python benchmarks/input_tables.py [--json] [--repeats N]

Both sides take turns, CPU seconds are compared, and medians are printed, seconds beside them. The sides share this
process, in which all packages are imported, or have a process of their own each time, whose start and imports count.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq

from jaxdist import data

NUM_ROWS, NUM_COLUMNS, BATCH_SIZE, NUM_READ = 200_000, 8, 64, 20_000


def make_tables(folder: pathlib.Path) -> None:
    values = np.random.default_rng(0).random((NUM_ROWS, NUM_COLUMNS))
    columns = {f"c{number}": values[:, number] for number in range(NUM_COLUMNS)}
    pandas.DataFrame(columns).to_csv(folder / "t.csv", index=False)
    pq.write_table(pa.table(columns), folder / "t.parquet", row_group_size=20_000)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float32).reshape(-1)), NUM_COLUMNS)
    pq.write_table(pa.table({"x": lists.cast(pa.list_(pa.float32()))}), folder / "lists.parquet", row_group_size=20_000)


def first_batch(source: data.Source) -> None:
    next(iter(data.Loader(source, global_batch_size=BATCH_SIZE, seed=0)))


def pandas_first_batch(path: pathlib.Path) -> None:
    table = pandas.read_csv(path)
    ids = np.random.default_rng(0).permutation(len(table))[:BATCH_SIZE]
    assert len({name: table[name].to_numpy()[ids] for name in table}) == NUM_COLUMNS


def shuffled_rows(source: data.Source) -> None:
    """Read rows in the default order, without the loader's batches."""
    for index in data.order.Shuffled()(len(source), 0, 0, 0, NUM_READ).tolist():
        source[index]


def rows_of_pyarrow(path: pathlib.Path) -> None:
    """Read the file in its order and turn each row into Python objects: pyarrow's own way to rows."""
    count = 0
    for batch in pq.ParquetFile(path).iter_batches(1024):
        for row in batch.to_pylist():
            assert row
            count += 1
            if count == NUM_READ:
                return


OURS_ALONE = """
from jaxdist import data
next(iter(data.Loader(data.csv_source({path!r}), global_batch_size=64, seed=0)))
"""
PANDAS_ALONE = """
import numpy as np
import pandas
table = pandas.read_csv({path!r})
ids = np.random.default_rng(0).permutation(len(table))[:64]
batch = {{name: table[name].to_numpy()[ids] for name in table}}
"""


def alone(program: str, path: pathlib.Path) -> None:
    subprocess.run([sys.executable, "-c", program.format(path=os.fspath(path))], check=True)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of those that it started and that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def compare(name: str, ours: Callable[[], None], theirs: Callable[[], None], unit: str, repeats: int) -> dict:
    """Return the medians of both sides, which take turns."""
    cpu: dict[str, list[float]] = {"ours": [], "theirs": []}
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(-1, repeats):
        for side, function in (("ours", ours), ("theirs", theirs)):
            used, start = cpu_seconds(), time.perf_counter()
            function()
            if turn >= 0:
                cpu[side].append(cpu_seconds() - used)
                seconds[side].append(time.perf_counter() - start)
    scale = 1e6 / NUM_READ if unit.startswith("micro") else 1.0
    medians = {side: scale * statistics.median(values) for side, values in cpu.items()}
    walls = {f"{side}_seconds": scale * statistics.median(values) for side, values in seconds.items()}
    return {
        "name": name,
        **medians,
        **walls,
        "ratio": medians["ours"] / medians["theirs"],
        "unit": unit,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", type=int, metavar="N", help="the first N works")
    options = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "pandas", "pyarrow")}
    versions |= {"cpus": str(os.cpu_count()), "load before": f"{os.getloadavg()[0]:.1f}"}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_tables(folder)
        table, lists = (data.ParquetSource(folder / file) for file in ("t.parquet", "lists.parquet"))
        works = [
            ("CSV 200,000 x 8 to the first batch", "CPU seconds",
             lambda: first_batch(data.csv_source(folder / "t.csv")),
             lambda: pandas_first_batch(folder / "t.csv")),
            ("the same in a process of its own, imports included", "CPU seconds",
             lambda: alone(OURS_ALONE, folder / "t.csv"), lambda: alone(PANDAS_ALONE, folder / "t.csv")),
            ("Parquet rows, shuffled (theirs in order)", "microseconds CPU a row", lambda: shuffled_rows(table),
             lambda: rows_of_pyarrow(folder / "t.parquet")),
            ("Parquet lists, shuffled (theirs in order)", "microseconds CPU a row", lambda: shuffled_rows(lists),
             lambda: rows_of_pyarrow(folder / "lists.parquet")),
        ]  # fmt: skip
        for name, unit, ours, theirs in works if options.only is None else works[: options.only]:
            row = compare(name, ours, theirs, unit, options.repeats)
            text = f"{name:51} {row['ours']:8.3f} {row['theirs']:8.3f} {row['ratio']:6.2f}x {unit}"
            text += f"; seconds {row['ours_seconds']:.3f} {row['theirs_seconds']:.3f}"
            print(json.dumps(row | {"versions": versions}) if options.json else text, flush=True)


if __name__ == "__main__":
    main()
