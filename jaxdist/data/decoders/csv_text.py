"""The text of a CSV file: decompressed, in UTF-8, without what is above the table; its delimiter and its header."""

import collections
import csv
import io
import itertools
import lzma
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxdist import extras
from jaxdist.data.decoders.kinds import check_kind
from jaxdist.data.sources.listing import read_file
from jaxdist.data.sources.source import CorruptExample
from jaxdist.setting_group import whole_number

KINDS = (".csv", ".tsv")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".xz": "xz"}
_DELIMITERS = (",", ";", "\t", "|")
_LINE_END = re.compile(rb"\r\n?|\n")


class Style(NamedTuple):
    """How files are written; see `csv_source`."""

    delimiter: str | None = None
    names: Sequence[str] | None = None
    comment: str | None = None
    encoding: str = "utf-8"
    short_rows: str = "refuse"
    skip_lines: int = 0

    def checked(self) -> "Style":
        """Return the style; ValueError where a setting is none."""
        mark = self.delimiter
        if mark is not None and (len(mark) != 1 or not mark.isascii() or mark in '\r\n"'):
            raise ValueError(f"delimiter is one ASCII character, not a quote or a line's end; got {mark!r}.")
        if self.comment == "":
            raise ValueError("comment is the text that lines to skip start with; got ''. None skips no lines.")
        whole_number("skip_lines", self.skip_lines, least=0)
        if self.short_rows not in ("refuse", "fill"):
            raise ValueError(f"short_rows is 'refuse' or 'fill'; got {self.short_rows!r}.")
        if isinstance(self.names, str):
            raise ValueError(f"names is a list of the columns' names; got {self.names!r}.")
        return self


class CsvText(NamedTuple):
    """A file's text, from the header's line on, which takes `num_lines`; the columns' names are distinct."""

    path: str
    data: bytes
    delimiter: str
    names: list[str]
    num_lines: int


def open_text(path: str, style: Style) -> CsvText:
    """Return the text of a file.

    Raises:
      ValueError: it is of another kind or encoding, or has no header or no row.
      CorruptExample: it cannot be decompressed.
    """
    data, delimiter = _table_of(path, style)
    lines = _lines(data)
    try:
        header, num_lines = _header_of(lines, delimiter) if style.names is None else (style.names, 0)
        if not any(map(str.strip, lines)):
            raise ValueError(f"{path} needs a header line and at least one row, or `names` of its columns.")
        names = distinct(header)
        if style.names is None and _are_values(header):
            warnings.warn(
                f"{path}: the first line, {', '.join(header[:4])}, was read as the names of the columns, and holds "
                "numbers. If it is an example, give `names`.",
                stacklevel=2,
            )
        data = data if style.short_rows == "refuse" else _filled(data, delimiter, len(names))
    except csv.Error as error:
        raise ValueError(
            f"{path} has a cell that cannot be read: {error}. A quote may be open, or `delimiter` another."
        ) from error
    return CsvText(path, data, delimiter, names, num_lines)


def header_of(path: str, style: Style) -> list[str]:
    """Return the cells of the first line of a file's table, which is its header if it has one; see `open_text`."""
    data, delimiter = _table_of(path, style)
    try:
        return _header_of(_lines(data), delimiter)[0]
    except csv.Error:
        return []


def _table_of(path: str, style: Style) -> tuple[bytes, str]:
    """Return the text of a file from its table on, and its delimiter."""
    data = _decompressed(path, read_file(path))
    check_kind(
        path, data[:16], wanted="text (CSV)", do="Write it as CSV; compressed files are named .csv.gz and the like."
    )
    return _table_in(_as_utf8(path, data, style.encoding), style)


def _decompressed(path: str, data: bytes) -> bytes:
    """Return the content of a file whose name says that it is compressed; CorruptExample where it is not whole."""
    kind, pyarrow = COMPRESSIONS.get(os.path.splitext(path)[1].lower()), extras.require("pyarrow")
    if kind is None:
        return data
    try:
        if kind == "xz":
            return lzma.decompress(data)
        with pyarrow.input_stream(pyarrow.BufferReader(data), compression=kind) as stream:
            content: bytes = stream.read()
            return content
    except (OSError, lzma.LZMAError) as error:
        raise CorruptExample(
            f"{path} cannot be decompressed: {error}. Copy it again, or correct its suffix."
        ) from error


def _as_utf8(path: str, data: bytes, encoding: str) -> bytes:
    """Return text in UTF-8, without a byte order mark; ValueError where it is not in `encoding`."""
    try:
        if encoding.lower() not in ("utf-8", "utf8"):
            data = data.decode(encoding).encode()
        elif not data.isascii():
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
    return data.removeprefix(b"\xef\xbb\xbf")


def _table_in(data: bytes, style: Style) -> tuple[bytes, str]:
    """Return the text without lines to skip, comments, and blank lines before the header; and its delimiter.

    White space alone is a row where there is one column, and refused where there are more: it is left out here.
    """
    for _ in range(style.skip_lines):
        found = _LINE_END.search(data)
        data = data[found.end() :] if found else b""
    shown = (line.rstrip("\r\n") for line in _lines(data) if not line.startswith(style.comment or "\n"))
    first = re.sub('"[^"]*"?', "", next(filter(None, shown), ""))
    delimiter = style.delimiter or next((mark for mark in _DELIMITERS if mark in first), ",")
    blanks = b"\r\n" if delimiter in first else b" \t\r\n".replace(delimiter.encode(), b"")
    if style.comment is not None or delimiter not in first:
        data = b"".join(line for line in _rows(data, delimiter, style.comment) if line.strip(blanks))
    return data.lstrip(b"\r\n"), delimiter


def _rows(data: bytes, delimiter: str, comment: str | None) -> Iterator[bytes]:
    """Yield the lines that are no comments, each with those on which its quoted cells continue."""
    mark = re.escape(delimiter.encode())
    cell = rb'(?:"(?:[^"]|"")*+(?:"|\Z))?+[^%s\r\n]*+' % mark
    left_out = rb"(?!)" if comment is None else re.escape(comment.encode())
    row = rb"(%s[^\r\n]*+)?+%s(?:%s%s)*+(?:\r\n?|\n|\Z)" % (left_out, cell, mark, cell)
    return (found[0] for found in re.finditer(row, data) if found[1] is None)


def _lines(data: bytes) -> Iterator[str]:
    return iter(io.TextIOWrapper(io.BytesIO(data), "utf-8", newline=""))


def _header_of(lines: Iterator[str], delimiter: str) -> tuple[list[str], int]:
    """Return the cells of the header, and how many lines it takes; the others are left in `lines`."""
    rows = csv.reader(lines, delimiter=delimiter)
    return next(rows, []), rows.line_num


def _filled(data: bytes, delimiter: str, width: int) -> bytes:
    """Return the text with empty cells at the end of rows that have fewer than `width`, and without blank lines."""
    rows = [row for row in csv.reader(_lines(data), delimiter=delimiter) if len(row) > 1 or "".join(row).strip()]
    made = io.StringIO(newline="")
    writer = csv.writer(made, delimiter=delimiter, lineterminator="\n")
    writer.writerows([*row, *[""] * (width - len(row))] for row in rows)
    return made.getvalue().encode()


def _are_values(header: Sequence[str]) -> bool:
    """Return whether all names are numbers, and do not just number the columns from 0 or 1."""
    try:
        numbers = [float(name) for name in header]
    except ValueError:
        return False
    return numbers[0] not in (0, 1) or any(after - before != 1 for before, after in itertools.pairwise(numbers))


def distinct(names: Sequence[str]) -> list[str]:
    """Return the names, the second of equal ones with .1 behind it, as pandas has them; named columns come first."""
    whole = [name or f"Unnamed: {place}" for place, name in enumerate(names)]
    given, taken, counts = set(whole), set[str](), collections.Counter[str]()
    found: dict[int, str] = {}
    for place in sorted(range(len(names)), key=lambda place: not names[place]):
        each = whole[place]
        while each in taken or (counts[whole[place]] and each in given):
            counts[whole[place]] += 1
            each = f"{whole[place]}.{counts[whole[place]]}"
        taken.add(each)
        found[place] = each
    return [found[place] for place in range(len(names))]
