"""CSV files held in memory: a row is an example, a column a field. Read by pyarrow, to the values that pandas reads."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxdist import extras
from jaxdist.data.decoders import csv_text
from jaxdist.data.decoders.arrow import as_numpy
from jaxdist.data.decoders.csv_table import MISSING_TEXTS, read_table
from jaxdist.data.fingerprints import FileList, leaves
from jaxdist.data.sources.listing import find_files
from jaxdist.data.sources.source import ArraySource
from jaxdist.data.sources.vocabulary import listed

Categories = Sequence[str] | Mapping[str, Sequence[str]]


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
    chosen = _Chosen.of(columns, categories, missing)
    style = csv_text.Style(delimiter, names, comment, encoding, short_rows, skip_lines).checked()
    return _source(_files(paths), chosen, style)


class TableSettings(NamedTuple):
    """How a table was read: the columns that it gave, what a missing number became, and how the text is written."""

    columns: tuple[str, ...] | None = None
    missing: float | None = None
    style: csv_text.Style = csv_text.Style()

    @classmethod
    def of(cls, source: Any) -> "TableSettings":
        """Return the settings of a source, or of the first table among those that it is made of; else the defaults."""
        found = (getattr(leaf, "table", None) for leaf in leaves(source))
        return next((table for table in found if isinstance(table, cls)), cls())

    def columns_in(self, names: Sequence[str]) -> list[str] | None:
        """Return those of the columns that are among `names`; None for all that is there."""
        return None if self.columns is None else [name for name in self.columns if name in names]


def csv_like(
    paths: str, like: TableSettings, vocabulary: Mapping[str, Sequence[str]], columns: Sequence[str] | None
) -> ArraySource:
    """Return the rows of files that are written as those of `like`, or have a header where those have none.

    `vocabulary` numbers the columns of texts. `columns` must be there; None takes what is there of the columns of
    `like`.
    """
    files, style = _files(paths), like.style
    if style.names is not None and {*(columns or style.names)} <= {*csv_text.header_of(files[0], style)}:
        style = style._replace(names=None)
    first = csv_text.open_text(files[0], style)
    wanted = like.columns_in(first.names) if columns is None else columns
    categories = {name: texts for name, texts in vocabulary.items() if name in (wanted or first.names)}
    numbers = None if wanted is None else [name for name in wanted if name not in categories]
    return _source(files, _Chosen.of(numbers, categories, like.missing), style, first=first)


def _files(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    endings = ["", *csv_text.COMPRESSIONS]
    return find_files(paths, *(f"*{kind}{end}" for end in endings for kind in csv_text.KINDS))


class _Chosen(NamedTuple):
    """The columns that become fields, and how; None for all columns, or where texts are numbered as they are found."""

    columns: tuple[str, ...] | None
    categories: Mapping[str, tuple[str, ...] | None]
    missing: float | None

    @classmethod
    def of(cls, columns: Sequence[str] | None, categories: Categories, missing: float | None) -> "_Chosen":
        """Return the choice; ValueError where names are not a list of distinct ones, or there are none."""
        known: dict[str, tuple[str, ...] | None]
        if isinstance(categories, Mapping):
            known = {name: listed(texts, what=f"The texts of {name!r}") for name, texts in categories.items()}
        else:
            known = dict.fromkeys(listed(categories, what="`categories`"), None)
        found = cls(None if columns is None else listed(columns, what="`columns`"), known, missing)
        if found.columns == () and not known:
            raise ValueError("An example needs a field: `columns` is empty, and so is `categories`. None keeps all.")
        return found

    def among(self, path: str, names: Sequence[str]) -> list[str]:
        """Return the names that are chosen, in the file's order; ValueError where the file lacks one."""
        for name in [*(self.columns or ()), *self.categories]:
            if name not in names:
                raise ValueError(f"{path} has no column {name!r}; its columns are {[*names]}.")
        return [n for n in names if self.columns is None or n in self.columns or n in self.categories]


def _source(
    files: Sequence[str], chosen: _Chosen, style: csv_text.Style, *, first: csv_text.CsvText | None = None
) -> ArraySource:
    """Return the rows of some files, of which the `first` may have been opened."""
    first = first or csv_text.open_text(files[0], style)
    names = first.names
    wanted = chosen.among(files[0], names)
    tables = [read_table(first, wanted, [*chosen.categories])]
    del first  # a file's text takes as much memory as its numbers
    for path in files[1:]:
        text = csv_text.open_text(path, style)
        if text.names != names:
            raise ValueError(f"{path} has the columns {text.names}, {files[0]} has {names}.")
        tables.append(read_table(text, wanted, [*chosen.categories]))
    table, shown = _joined(tables, files, wanted), ", ".join(files[:3])
    arrays, vocabulary = {}, {}
    for name in wanted:
        if name in chosen.categories:
            known = chosen.categories[name]
            vocabulary[name], arrays[name] = numbered(f"{shown}: column {name!r}", table.column(name), known)
        else:
            arrays[name] = _numbers(name, table.column(name), chosen.missing, shown)
    source = ArraySource(arrays)
    source.vocabulary, source.files = vocabulary, FileList(files)
    source.table = TableSettings(tuple(wanted), chosen.missing, style)
    return source


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


def _joined(tables: Sequence[Any], files: Sequence[str], wanted: Sequence[str]) -> Any:
    """Return all rows of the tables; ValueError where a column is of another kind in one of them."""
    pyarrow = extras.require("pyarrow")
    try:
        return pyarrow.concat_tables(tables, promote_options="permissive")
    except pyarrow.ArrowTypeError as error:
        found = {
            name: {str(table.schema.field(name).type): path for table, path in zip(tables, files)} for name in wanted
        }
        mixed = {name: kinds for name, kinds in found.items() if len(kinds) > 1 and kinds.keys() & {"string", "bool"}}
        raise ValueError(
            f"Columns have numbers in one file and something else in another: {mixed}. Leave them out of `columns`, or "
            "name them in `categories`."
        ) from error
    except pyarrow.ArrowInvalid as error:  # negative with beyond 2**63, or beyond 2**53 with floats
        kinds = {name: sorted({str(table.schema.field(name).type) for table in tables}) for name in wanted}
        several = {name: each for name, each in kinds.items() if len(each) > 1}
        raise ValueError(
            f"Columns have whole numbers in one file that the type of another cannot hold: {several}; {error}. "
            "Write all files with one kind of numbers, or leave them out of `columns`."
        ) from error


def _numbers(name: str, column: Any, missing: float | None, files: str) -> np.ndarray:
    pyarrow, types = extras.require("pyarrow"), extras.require("pyarrow.types")
    kind = column.type
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind)
    if not is_number:
        values = column.to_pylist()
        row, text = next(((row, value) for row, value in enumerate(values) if not _is_number(value)), (0, values[0]))
        raise ValueError(
            f"{files}, row {row + 1}: column {name!r} holds {str(text)!r}, which is not a number. Leave "
            "the column out of `columns`, or name it in `categories`."
        )
    if not column.null_count:
        return as_numpy(column)
    if missing is None:
        row = next(i for i, value in enumerate(column) if not value.is_valid)
        raise ValueError(
            f"{files}, row {row + 1}: column {name!r} has no value, as have {column.null_count} rows in "
            "all. Say what stands for a missing value, as in missing=math.nan, or leave the column out of `columns`."
        )
    try:
        floats = (column.cast(pyarrow.int8()) if types.is_boolean(kind) else column).cast(pyarrow.float64())
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"{files}: column {name!r} lacks values, which makes it float64, and that would round its "
            f"whole numbers: {error}. Write a number in the empty cells, or leave the column out of `columns`."
        ) from error
    return as_numpy(floats, fill=float(missing))


def _is_number(value: Any) -> bool:
    try:
        float(str(value).replace("_", "x"))
    except ValueError:
        return value is None or str(value) in MISSING_TEXTS
    return True
