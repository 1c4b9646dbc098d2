"""Every CSV file of the packages that are installed here: what pandas reads, given at most a line that says how."""

import contextlib
import math
import pathlib
import sysconfig
import warnings

import numpy as np
import pandas
import pytest

from jaxdist.data import csv_source

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

PACKAGES = (
    "numpy",
    "scipy",
    "sklearn",
    "statsmodels",
    "bokeh_sampledata",
    "vega_datasets",
    "plotly",
    "seaborn",
    "lifelines",
)
"""Packages with tables among their data; those that are not installed are left out."""

REFUSED = (
    "columns, got",  # a header of another width than the rows, notes above the table, rows that end early
    "at least one row",  # one line: a header or a row, the file does not say
    "Name its encoding",
)
"""What a message that a file is refused with may say; each names what to add."""


def files():
    folder = pathlib.Path(sysconfig.get_paths()["purelib"])
    found = [path for name in PACKAGES for pattern in ("*.csv", "*.csv.gz") for path in (folder / name).rglob(pattern)]
    return sorted(path for path in found if path.stat().st_size < 3_000_000)


def delimiter_of(path):
    with contextlib.suppress(UnicodeDecodeError, ValueError):
        line = pandas.read_csv(path, sep="\x01", header=None, nrows=1, dtype=str, quoting=3, encoding="utf-8").iloc[
            0, 0
        ]
        return next((mark for mark in (",", ";", "\t", "|") if mark in line), ",")
    return ","


def difference(theirs, ours):
    """Return how two tables differ; columns of texts are compared by their texts."""
    if list(map(str, theirs.columns)) != list(ours.arrays):
        return f"columns {list(theirs.columns)[:8]}, here {list(ours.arrays)[:8]}"
    for name, array in ours.arrays.items():
        column = theirs[name]
        if name in ours.vocabulary:
            texts = np.array(ours.vocabulary[name], object)[array]
            known = ~column.isna().to_numpy()  # a text such as NA is a text here, and missing for pandas
            if not (texts[known] == column.astype(str).to_numpy()[known]).all():
                return f"texts of {name}"
        elif array.dtype != column.to_numpy().dtype:
            return f"{name} is {array.dtype}, {column.to_numpy().dtype} for pandas"
        elif not np.array_equal(array, column.to_numpy(), equal_nan=array.dtype.kind == "f"):
            return f"values of {name}"
    return ""


def test_every_table_is_what_pandas_reads_or_is_refused_with_what_to_add():
    wrong, counts = [], {"as it is": 0, "with a line": 0, "refused": 0}
    for path in files():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                theirs = pandas.read_csv(path, sep=delimiter_of(path), low_memory=False)
            except Exception:  # pandas has messages of many kinds for files that are no tables
                theirs = None
        texts = (
            [] if theirs is None else [n for n in theirs.columns if not pandas.api.types.is_numeric_dtype(theirs[n])]
        )
        ours, message = None, ""
        for kind, settings in (("as it is", {}), ("with a line", {"categories": texts, "missing": math.nan})):
            try:
                ours = csv_source(path, **settings)
            except ValueError as error:
                message = str(error)
                continue
            counts[kind] += 1
            break
        if ours is None:
            counts["refused"] += 1
            wrong += [] if any(reason in message for reason in REFUSED) else [f"{path.name}: {message[:200]}"]
        elif theirs is None:
            wrong.append(f"{path.name}: read here, refused by pandas")
        elif found := difference(theirs, ours):
            wrong.append(f"{path.name}: {found}")
    assert sum(counts.values()) >= 40, counts
    assert counts["refused"] <= 0.1 * sum(counts.values()), counts
    assert not wrong, f"{counts}\n" + "\n".join(wrong)
