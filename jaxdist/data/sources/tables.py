"""CSV files held in memory: a row is an example, a column a field. Read by pyarrow, to the values that pandas reads."""

import collections
import csv
import io
import lzma
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxdist import extras
from jaxdist.data.decoders.arrow import as_numpy
from jaxdist.data.decoders.kinds import check_kind
from jaxdist.data.fingerprints import FileList
from jaxdist.data.sources.listing import find_files, read_file
from jaxdist.data.sources.source import ArraySource, CorruptExample
from jaxdist.data.sources.vocabulary import listed
from jaxdist.setting_group import whole_number

MISSING_TEXTS = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
)
"""The texts that mean a missing number: pandas's list."""

Categories = Sequence[str] | Mapping[str, Sequence[str]]

_QUICK = ("", "nan", "NaN", "-nan", "-NaN")
"""The missing texts that would pass as numbers; the others make a column of texts, which is then read again."""

_BLOCK = 2**20
_MAX_HEADER = 2**16
_MAX_BLOCK = 2**31 - 2
_KINDS = (".csv", ".tsv")
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}


def csv_source(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    columns: Sequence[str] | None = None,
    categories: Categories = (),
    missing: float | None = None,
    delimiter: str | None = None,
    names: Sequence[str] | None = None,
    comment: str | None = None,
    encoding: str = "utf-8",
    short_rows: Literal["refuse", "fill"] = "refuse",
    skip_lines: int = 0,
) -> ArraySource:
    """Return the rows of CSV files: whole numbers as int64 (uint64 from 2**63 on), others float64, true and false bool.

    >>> train = csv_source("train.csv", categories=("colour",))
    >>> held_out = csv_source("test.csv", categories=train.vocabulary)

    Args:
      paths: a file, several, or a folder of `.csv` and `.tsv` files, which all have the same columns. Files that end
        with `.gz`, `.bz2`, `.xz`, `.zst` or `.lz4` are decompressed.
      columns: the columns of numbers to keep; None keeps all. Columns in `categories` are kept in any case.
      categories: columns of texts, which become int32 numbers: the place of the text among the column's sorted texts. A
        mapping gives each column's texts by number, those of the training data for example; another text is refused. An
        empty cell is the text "", and NA is one too.
      missing: what an empty cell, or one such as NA, becomes in a column of numbers (math.nan, for example), which is
        float64 then; None refuses it.
      delimiter: None takes the first of `,`, `;`, tab and `|` that the first line has.
      names: of the columns, for files without a header line. Of columns of the same name, the second becomes `name.1`.
      comment: lines that start with it are skipped.
      encoding: of the text. A byte order mark is skipped.
      skip_lines: lines before the table: before the header, or, with `names`, instead of it.
      short_rows: a row with fewer cells than the header is refused, or its last cells are empty, as in pandas.

    Raises:
      ValueError: a column that is missing, or one that holds something other than numbers and is not a category.
      CorruptExample: a row with more cells than the header, or with fewer unless `short_rows` says otherwise.
    """
    wanted_columns = None if columns is None else listed(columns, what="`columns`")
    given: dict[str, tuple[str, ...] | None]
    if isinstance(categories, Mapping):
        given = {name: listed(texts, what=f"The texts of {name!r}") for name, texts in categories.items()}
    else:
        given = dict.fromkeys(listed(categories, what="`categories`"), None)
    style = _checked(_Style(delimiter, names, comment, encoding, short_rows, skip_lines))
    files = find_files(paths, *(f"*{kind}{suffix}" for suffix in ("", *_COMPRESSIONS, ".xz") for kind in _KINDS))
    tables = [_read(path, given, style) for path in files]
    known = tables[0].column_names
    for name in [*(wanted_columns or ()), *given]:
        if name not in known:
            raise ValueError(f"{files[0]} has no column {name!r}; its columns are {known}.")
    wanted = [name for name in known if wanted_columns is None or name in wanted_columns or name in given]
    table = _joined(tables, files, wanted)
    arrays, vocabulary = {}, {}
    for name in wanted:
        if name in given:
            column = f"{', '.join(files[:3])}: column {name!r}"
            vocabulary[name], arrays[name] = numbered(column, table.column(name), given[name])
        else:
            arrays[name] = _numbers(name, table.column(name), missing, files)
    source = ArraySource(arrays)
    source.vocabulary, source.files = vocabulary, FileList(files)
    return source


def columns_of(path: str) -> list[str]:
    """Return the names of a CSV file's columns, which its header has."""
    data = _text_of(path, style := _checked(_Style(None, None, None, "utf-8", "refuse", 0)))
    return _distinct(_header_of(path, data, style.delimiter or _delimiter_of(data))[0])


def numbered(name: str, column: Any, known: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of a column of texts and the number of each row's; ValueError for a text that is not `known`.

    `name` is what messages call the column.
    """
    compute, pyarrow = extras.require("pyarrow.compute"), extras.require("pyarrow")
    texts = column.cast(pyarrow.string())
    if texts.null_count:
        raise ValueError(f"{name} has no text in {texts.null_count} rows, so it cannot be a category.")
    found = compute.unique(texts)
    distinct = found.to_pylist()
    names = tuple(sorted(distinct) if known is None else known)
    numbers = {text: number for number, text in reversed([*enumerate(names)])}
    unknown = sorted(text for text in distinct if text not in numbers)
    if unknown:
        raise ValueError(
            f"{name} holds {unknown[:5]}, which are not among its known texts, {list(names)[:10]}. "
            "Add them to the vocabulary, or remove these rows."
        )
    places = as_numpy(compute.index_in(texts, value_set=found))
    return names, np.array([numbers[text] for text in distinct], np.int32)[places]


class _Style(NamedTuple):
    """How the files are written; see `csv_source`."""

    delimiter: str | None
    names: Sequence[str] | None
    comment: str | None
    encoding: str
    short_rows: str
    skip_lines: int


def _checked(style: _Style) -> _Style:
    """Return the style; ValueError where a setting is none."""
    mark = style.delimiter
    if mark is not None and (len(mark) != 1 or not mark.isascii() or mark in '\r\n"'):
        raise ValueError(f"delimiter is one ASCII character, not a quote or a line's end; got {mark!r}.")
    if style.comment == "":
        raise ValueError("comment is the text that lines to skip start with; got ''. None skips no lines.")
    whole_number("skip_lines", style.skip_lines, least=0)
    if style.short_rows not in ("refuse", "fill"):
        raise ValueError(f"short_rows is 'refuse' or 'fill'; got {style.short_rows!r}.")
    if isinstance(style.names, str):
        raise ValueError(f"names is a list of the columns' names; got {style.names!r}.")
    return style


def _read(path: str, categories: Mapping[str, Any], style: _Style) -> Any:
    """Return the table in a file, its column names made distinct, texts where they are not numbers."""
    arrow_csv, pyarrow = extras.require("pyarrow.csv"), extras.require("pyarrow")
    data = _text_of(path, style)
    delimiter = style.delimiter or _delimiter_of(data)
    header, num_lines = _header_of(path, data, delimiter) if style.names is None else (style.names, 0)
    distinct = _distinct(header)
    if style.short_rows == "fill":
        data = _filled(data, delimiter, len(distinct))
    texts = {name: pyarrow.string() for name in categories}

    def read(types: Mapping[str, Any], *, whole: bool = True, use_threads: bool = True, missing: Any = _QUICK) -> Any:
        # In one block, the type of a column is inferred over all of its rows.
        size = len(data) + 1 if whole else _BLOCK
        lines = {"block_size": min(max(size, 2**16), _MAX_BLOCK), "column_names": distinct, "skip_rows": num_lines}
        return arrow_csv.read_csv(
            pyarrow.BufferReader(data),
            read_options=arrow_csv.ReadOptions(**lines, use_threads=use_threads),
            parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=whole),
            convert_options=arrow_csv.ConvertOptions(
                column_types={**texts, **types},
                null_values=missing,
                strings_can_be_null=False,
                true_values=["True", "TRUE", "true"],
                false_values=["False", "FALSE", "false"],
            ),
        )

    try:
        table = _inferred(read, in_blocks=b'"' not in data)
        whole = [name for name in distinct if pyarrow.types.is_integer(table.column(name).type)]
        # One byte is found ten times as fast as two, and most tables of numbers have no x.
        if whole and ((b"x" in data and b"0x" in data) or (b"X" in data and b"0X" in data)):
            texts |= dict.fromkeys(_hexadecimal(read, whole), pyarrow.string())
            table = read({})
        others = [name for name in distinct if name not in texts]
        if any(pyarrow.types.is_string(table.column(name).type) for name in others):
            table = read({}, missing=MISSING_TEXTS)
        floats = [name for name in others if pyarrow.types.is_floating(table.column(name).type)]
        return _with_exact_floats(table, floats, read, signed=b"+" in data)
    except pyarrow.ArrowInvalid as error:
        raise CorruptExample(
            f"{path} cannot be read as CSV: {_with_row(error, read)} What is above the table is skipped by "
            "`skip_lines`; `names` gives the columns where the header does not; `short_rows` fills rows that end early."
        ) from error


def _inferred(read: Callable[..., Any], *, in_blocks: bool) -> Any:
    """Return the table; in blocks, which several threads read, where the types of the first block hold for all."""
    if in_blocks:
        try:
            return read({}, whole=False)
        except extras.require("pyarrow").ArrowInvalid:
            pass
    return read({})


def _with_row(error: Exception, read: Callable[..., Any]) -> str:
    """Return the error's message with the row in it, which pyarrow only knows when it reads in one thread."""
    try:
        read({}, use_threads=False)
    except extras.require("pyarrow").ArrowInvalid as found:
        return str(found)
    return str(error)


def _text_of(path: str, style: _Style) -> bytes:
    """Return the file's text in UTF-8, decompressed, without lines to skip, comments and byte order mark."""
    data, comment, encoding = _decompressed(path, read_file(path)), style.comment, style.encoding
    check_kind(
        path, data[:16], wanted="text (CSV)", do="Write it as CSV; compressed files are named .csv.gz and the like."
    )
    try:
        text = data.decode(encoding) if encoding.lower() not in ("utf-8", "utf8") else None
        if text is None and not data.isascii():
            data.decode("utf-8")
    except LookupError as error:
        raise ValueError(
            f"There is no encoding {encoding!r}: {error}. Known are, for example, utf-8 and latin-1."
        ) from error
    except UnicodeDecodeError as error:
        likely = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1"
        raise ValueError(
            f"{path} is not text in {encoding}: {error}. Name its encoding, as in encoding={likely!r}."
        ) from error
    if text is not None:
        data = text.encode()
    data = data.removeprefix(b"\xef\xbb\xbf")
    if b"\r" in data[:_MAX_HEADER] and b"\n" not in data:  # lines as old versions of Excel for the Mac end them
        data = data.replace(b"\r", b"\n")
    for _ in range(style.skip_lines):
        data = data[data.find(b"\n") + 1 or len(data) :]
    if comment is not None:
        mark = comment.encode()
        data = b"".join(line for line in io.BytesIO(data) if not line.startswith(mark))
    return data.lstrip(b"\r\n")


def _decompressed(path: str, data: bytes) -> Any:
    """Return the content of a file whose name says that it is compressed; CorruptExample where it is not whole."""
    suffix, pyarrow = os.path.splitext(path)[1].lower(), extras.require("pyarrow")
    try:
        if suffix == ".xz":
            return lzma.decompress(data)
        if suffix not in _COMPRESSIONS:
            return data
        with pyarrow.input_stream(pyarrow.BufferReader(data), compression=_COMPRESSIONS[suffix]) as stream:
            return stream.read()
    except (OSError, lzma.LZMAError) as error:
        raise CorruptExample(
            f"{path} cannot be decompressed: {error}. Copy it again, or correct its suffix."
        ) from error


def _filled(data: bytes, delimiter: str, width: int) -> bytes:
    """Return the text with empty cells at the end of rows that have fewer than `width`; empty lines stay empty."""
    rows = csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8", newline=""), delimiter=delimiter)
    found = list(rows)
    if all(len(row) in (0, width) for row in found):
        return data
    made = io.StringIO(newline="")
    writer = csv.writer(made, delimiter=delimiter, lineterminator="\n")
    writer.writerows([*row, *[""] * (width - len(row))] if row else [] for row in found)
    return made.getvalue().encode()


def _delimiter_of(data: bytes) -> str:
    first_line = data[: data.find(b"\n") + 1 or None].decode()
    return next((mark for mark in (",", ";", "\t", "|") if mark in first_line), ",")


def _header_of(path: str, data: bytes, delimiter: str) -> tuple[list[str], int]:
    """Return the names in the header, and how many lines it takes."""
    rows = csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8", newline=""), delimiter=delimiter)
    header = next(rows, [])
    end = 0
    for _ in range(rows.line_num):
        end = data.find(b"\n", end) + 1 or len(data)
    if not data[end : end + _MAX_HEADER].strip() and not data[end:].strip():
        raise ValueError(f"{path} needs a header line and at least one row, or `names` of its columns.")
    return header, rows.line_num


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, the second of equal ones with .1 behind it, as pandas has them; named columns come first."""
    whole = [name or f"Unnamed: {place}" for place, name in enumerate(names)]
    given, taken, counts = set(whole), set[str](), collections.Counter[str]()
    found: dict[int, str] = {}
    for place in sorted(range(len(names)), key=lambda place: not names[place]):
        distinct = whole[place]
        while distinct in taken or (counts[whole[place]] and distinct in given):
            counts[whole[place]] += 1
            distinct = f"{whole[place]}.{counts[whole[place]]}"
        taken.add(distinct)
        found[place] = distinct
    return [found[place] for place in range(len(names))]


def _hexadecimal(read: Callable[..., Any], whole: Sequence[str]) -> list[str]:
    """Return the columns of whole numbers with one such as 0xff, which pyarrow but not pandas takes for a number."""
    pyarrow, compute = extras.require("pyarrow"), extras.require("pyarrow.compute")
    as_texts = read(dict.fromkeys(whole, pyarrow.string()))
    return [
        name for name in whole if compute.any(compute.match_substring_regex(as_texts.column(name), "0[xX]")).as_py()
    ]


def _with_nulls(column: Any) -> Any:
    """Return a column of floats without a value where it is written as NaN in none of the texts of `_QUICK`: +NaN."""
    pyarrow, compute = extras.require("pyarrow"), extras.require("pyarrow.compute")
    return compute.if_else(compute.is_nan(column), pyarrow.scalar(None, column.type), column)


def _range(column: Any) -> tuple[float, float]:
    """Return the least and the greatest value of a column of floats, and 0 or beyond; NaN where one is."""
    parts = [as_numpy(chunk, fill=0.0) for chunk in column.chunks]
    lows, highs = [part.min(initial=0.0) for part in parts], [part.max(initial=0.0) for part in parts]
    return np.min(lows, initial=0.0), np.max(highs, initial=0.0)


def _with_exact_floats(table: Any, names: Sequence[str], read: Callable[..., Any], *, signed: bool) -> Any:
    """Return the table with nulls for NaNs in its columns of floats, and whole numbers where they are written as such.

    pyarrow takes those for floats beyond int64, and where one has a plus sign; `signed` says whether there may be one.
    """
    pyarrow, found, doubtful = extras.require("pyarrow"), {}, []
    for name in names:
        column = table.column(name)
        low, high = _range(column)
        if np.isnan(low):
            found[name] = column = _with_nulls(column)
            low, high = _range(column)
        if low <= -(2.0**63) or high >= 2.0**63 or (signed and _are_whole(column)):
            doubtful.append(name)
    if doubtful:
        texts = read(dict.fromkeys(doubtful, pyarrow.string()))  # once, for all of them
    for name in doubtful:
        written = [text.strip() for text in texts.column(name).to_pylist()]
        found[name] = _as_integers(name, written, found.get(name, table.column(name)))
    for name, column in found.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def _are_whole(column: Any) -> bool:
    parts = [as_numpy(chunk, fill=0.0) for chunk in column.chunks]
    return all((part == np.floor(part)).all() for part in parts)


def _as_integers(name: str, texts: Sequence[str], floats: Any) -> Any:
    """Return the numbers in `texts` as int64 or uint64, whichever holds them; `floats` where some are not whole."""
    pyarrow = extras.require("pyarrow")
    present = [text for text in texts if text not in MISSING_TEXTS]
    if not all(re.fullmatch(r"[+-]?[0-9]+", text) for text in present):
        return floats
    numbers = [None if text in MISSING_TEXTS else int(text) for text in texts]
    low, high = min(map(int, present), default=0), max(map(int, present), default=0)
    if high >= 2**64 or low < -(2**63) or (low < 0 and high >= 2**63):
        raise ValueError(f"Column {name!r} has whole numbers beyond 64 bits. Leave it out of `columns`.")
    return pyarrow.array(numbers, pyarrow.int64() if high < 2**63 else pyarrow.uint64())


def _joined(tables: Sequence[Any], files: Sequence[str], wanted: Sequence[str]) -> Any:
    """Return some columns of all tables; ValueError where a file has other columns, or one of another kind."""
    pyarrow, names = extras.require("pyarrow"), tables[0].column_names
    for table, path in zip(tables, files):
        if table.column_names != names:
            raise ValueError(f"{path} has the columns {table.column_names}, {files[0]} has {names}.")
    chosen = [table.select(wanted) for table in tables]
    try:
        return pyarrow.concat_tables(chosen, promote_options="permissive")
    except pyarrow.ArrowTypeError as error:
        found = {
            name: {str(table.schema.field(name).type): path for table, path in zip(chosen, files)} for name in wanted
        }
        mixed = {name: kinds for name, kinds in found.items() if len(kinds) > 1 and kinds.keys() & {"string", "bool"}}
        raise ValueError(
            f"Columns have numbers in one file and something else in another: {mixed}. Leave them out of `columns`, or "
            "name them in `categories`."
        ) from error
    except pyarrow.ArrowInvalid as error:  # negative with beyond 2**63, or beyond 2**53 with floats
        kinds = {name: sorted({str(table.schema.field(name).type) for table in chosen}) for name in wanted}
        several = {name: each for name, each in kinds.items() if len(each) > 1}
        raise ValueError(
            f"Columns have whole numbers in one file that the type of another cannot hold: {several}; {error}. "
            "Write all files with one kind of numbers, or leave them out of `columns`."
        ) from error


def _numbers(name: str, column: Any, missing: float | None, files: Sequence[str]) -> np.ndarray:
    pyarrow, types = extras.require("pyarrow"), extras.require("pyarrow.types")
    kind = column.type
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind)
    if not is_number:
        values = column.to_pylist()
        row, text = next(((row, value) for row, value in enumerate(values) if not _is_number(value)), (0, values[0]))
        raise ValueError(
            f"{', '.join(files[:3])}, row {row + 1}: column {name!r} holds {str(text)!r}, which is not a number. Leave "
            "the column out of `columns`, or name it in `categories`."
        )
    if not column.null_count:
        return as_numpy(column)
    if missing is None:
        row = next(i for i, value in enumerate(column) if not value.is_valid)
        raise ValueError(
            f"{', '.join(files[:3])}, row {row + 1}: column {name!r} has no value, as have {column.null_count} rows in "
            "all. Say what stands for a missing value, as in missing=math.nan, or leave the column out of `columns`."
        )
    try:
        floats = (column.cast(pyarrow.int8()) if types.is_boolean(kind) else column).cast(pyarrow.float64())
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"{', '.join(files[:3])}: column {name!r} lacks values, which makes it float64, and that would round its "
            f"whole numbers: {error}. Write a number in the empty cells, or leave the column out of `columns`."
        ) from error
    return as_numpy(floats, fill=float(missing))


def _is_number(value: Any) -> bool:
    try:
        float(str(value).replace("_", "x"))
    except ValueError:
        return value is None or str(value) in MISSING_TEXTS
    return True
