"""The columns of a CSV text as an Arrow table, of the types and values that pandas reads.

pyarrow parses and converts. It differs from pandas in a few kinds of numbers, which are looked for and corrected here:
0xff, NaNs in other spellings, and whole numbers that have a plus sign or are beyond int64.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdist import extras
from jaxdist.data.decoders.arrow import as_numpy
from jaxdist.data.decoders.csv_text import CsvText
from jaxdist.data.sources.source import CorruptExample

MISSING_TEXTS = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
)
"""The texts that mean a missing number: pandas's list."""

_BLOCK, _MAX_BLOCK, _FEW = 2**21, 2**31 - 2, 2**14

_Reader = Callable[..., Any]
"""Returns the table, with the Arrow types that are given for some columns; keywords: see `_reader_of`."""


def read_table(text: CsvText, wanted: Sequence[str], texts: Sequence[str]) -> Any:
    """Return the `wanted` columns in their order; those in `texts` stay texts, and so do others that are no numbers.

    Raises:
      CorruptExample: a row has more or fewer cells than the header.
      ValueError: whole numbers that 64 bits do not hold.
    """
    pyarrow = extras.require("pyarrow")
    read = _reader_of(text, wanted, dict.fromkeys(texts, pyarrow.string()))
    try:
        table = read({})
        whole = [field.name for field in table.schema if pyarrow.types.is_integer(field.type)]
        if whole and any(mark in text.data for mark in (b"0x", b"0X")):
            table = read(dict.fromkeys(_hexadecimal(whole, read), pyarrow.string()))
        table = table.combine_chunks()
        floats = [name for name in wanted if pyarrow.types.is_floating(table.column(name).type)]
        return _with_exact_floats(text, table, floats, read)
    except pyarrow.ArrowInvalid as error:
        raise CorruptExample(
            f"{text.path} cannot be read as CSV: {_with_row(error, read)} What is above the table is skipped by "
            "`skip_lines`; `names` gives the columns where the header does not; `short_rows` fills rows that end early."
        ) from error


def _reader_of(text: CsvText, wanted: Sequence[str], texts: Mapping[str, Any]) -> _Reader:
    arrow_csv, pyarrow = extras.require("pyarrow.csv"), extras.require("pyarrow")
    # A block may end within a quoted cell, where a line does.
    in_blocks = b'"' not in text.data

    def parse(types: Mapping[str, Any], *, block: int, use_threads: bool = True) -> Any:
        lines = {"block_size": min(block, _MAX_BLOCK), "column_names": text.names, "skip_rows": text.num_lines}
        return arrow_csv.read_csv(
            pyarrow.BufferReader(text.data),
            read_options=arrow_csv.ReadOptions(**lines, use_threads=use_threads),
            parse_options=arrow_csv.ParseOptions(delimiter=text.delimiter, newlines_in_values=not in_blocks),
            convert_options=arrow_csv.ConvertOptions(
                column_types={**texts, **types},
                include_columns=wanted,
                null_values=MISSING_TEXTS,
                strings_can_be_null=False,
                true_values=["True", "TRUE", "true"],
                false_values=["False", "FALSE", "false"],
            ),
        )

    def read(types: Mapping[str, Any], *, find_row: bool = False) -> Any:
        """Parse in blocks, which several threads do, where the types in the first block hold for all; else as one.

        pyarrow knows the row that is wrong only in one thread, which `find_row` asks for.
        """
        if in_blocks and not find_row:
            try:
                return parse(types, block=_BLOCK)
            except pyarrow.ArrowInvalid:
                pass
        return parse(types, block=len(text.data) + 1, use_threads=not find_row)

    return read


def _with_row(error: Exception, read: _Reader) -> str:
    """Return the error's message with the row in it."""
    try:
        read({}, find_row=True)
    except extras.require("pyarrow").ArrowInvalid as found:
        return str(found)
    return str(error)


def _hexadecimal(whole: Sequence[str], read: _Reader) -> list[str]:
    """Return the columns of `whole` numbers with one such as 0xff, which pyarrow but not pandas takes for a number."""
    pyarrow, compute = extras.require("pyarrow"), extras.require("pyarrow.compute")
    as_texts = read(dict.fromkeys(whole, pyarrow.string()))
    return [
        name for name in whole if compute.any(compute.match_substring_regex(as_texts.column(name), "0[xX]")).as_py()
    ]


def _with_exact_floats(text: CsvText, table: Any, names: Sequence[str], read: _Reader) -> Any:
    """Return the table with nulls for NaNs in its columns of floats, and whole numbers where they are written as such.

    pyarrow takes those for floats beyond int64, and where one has a plus sign.
    """
    pyarrow, found = extras.require("pyarrow"), dict[str, Any]()
    large, whole = list[str](), list[str]()
    for name in names:
        column = table.column(name)
        values = as_numpy(column, fill=0.0)
        if np.isnan(values.min(initial=0.0)):
            found[name] = column = _with_nulls(column)
            values = as_numpy(column, fill=0.0)
        if values.min(initial=0.0) <= -(2.0**63) or values.max(initial=0.0) >= 2.0**63:
            large.append(name)
        elif _are_whole(values):
            whole.append(name)
    doubtful = [*large, *(whole if whole and b"+" in text.data else ())]
    texts = read(dict.fromkeys(doubtful, pyarrow.string())) if doubtful else table  # once, for all of them
    for name in doubtful:
        written = [cell.strip() for cell in texts.column(name).to_pylist()]
        found[name] = _as_integers(f"{text.path}: column {name!r}", written, found.get(name, table.column(name)))
    for name, column in found.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def _with_nulls(column: Any) -> Any:
    """Return a column of floats without a value where it is written as NaN in none of the `MISSING_TEXTS`: +NaN."""
    pyarrow, compute = extras.require("pyarrow"), extras.require("pyarrow.compute")
    return compute.if_else(compute.is_nan(column), pyarrow.scalar(None, column.type), column)


def _are_whole(values: np.ndarray) -> bool:
    blocks = (values[begin : begin + _FEW] for begin in range(0, len(values), _FEW))
    return all((block == np.floor(block)).all() for block in blocks)


def _as_integers(column: str, texts: Sequence[str], floats: Any) -> Any:
    """Return the numbers in `texts` as int64 or uint64, whichever holds them; `floats` where some are not whole."""
    pyarrow = extras.require("pyarrow")
    present = [text for text in texts if text not in MISSING_TEXTS]
    if not all(re.fullmatch(r"[+-]?[0-9]+", text) for text in present):
        return floats
    numbers = [None if text in MISSING_TEXTS else int(text) for text in texts]
    low, high = min(map(int, present), default=0), max(map(int, present), default=0)
    if high >= 2**64 or low < -(2**63) or (low < 0 and high >= 2**63):
        raise ValueError(f"{column} has whole numbers beyond 64 bits. Leave it out of `columns`.")
    return pyarrow.array(numbers, pyarrow.int64() if high < 2**63 else pyarrow.uint64())
