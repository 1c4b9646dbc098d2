"""Tables as people write them, read in blocks of a few bytes, are what pandas reads."""

import contextlib
import io

import hypothesis
import numpy as np
import pandas
import pytest
from hypothesis import strategies as st

from jaxdist.data.decoders import csv_table, csv_text

TEXTS = st.sampled_from(
    ["a", "", "NA", "a,b", "x;y", 'say "hi"', '5" pipe', "two\nlines", "cr\rx", "two\r\nlines", "é", " lead", "#x", "1"]
)
NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1).map(str),
    st.integers(0, 2**64 - 1).map(str),
    st.floats(allow_nan=False).map(repr),
    st.sampled_from(["", "NA", "nan", "-1.#IND", "+4", " 5", "6 ", ".5", "1e5", "007", "-0"]),
)


@st.composite
def tables(draw):
    """Return a table of a column of texts and one of numbers, a delimiter and an encoding."""
    delimiter = draw(st.sampled_from([",", ";", "\t", "|"]))
    rows = draw(st.lists(st.tuples(TEXTS, NUMBERS), min_size=1, max_size=12))
    ends = st.sampled_from(draw(st.sampled_from([["\n"], ["\r\n"], ["\r"], ["\n", "\r\n", "\r", "\n\n"]])))
    quoted = draw(st.sampled_from([st.just(False), st.just(True), st.booleans()]))

    def written(cell):
        needs = any(mark in cell for mark in (delimiter, '"', "\r", "\n"))
        return '"' + cell.replace('"', '""') + '"' if needs or draw(quoted) else cell

    lines = [delimiter.join(map(written, row)) + draw(ends) for row in [("text", "number"), *rows]]
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"]))
    return "".join(lines).encode(encoding), delimiter, encoding


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(tables(), st.sampled_from([64, 200, 2**21]))
def test_quotes_line_ends_and_encodings_are_as_for_pandas(tmp_path_factory, table, block):
    content, delimiter, encoding = table
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(content)
    text = csv_text.open_text(str(path), csv_text.Style(delimiter=delimiter, encoding=encoding))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_table, "_BLOCK", block)
        both = csv_table.read_table(text, ["number", "text"], ["text", "number"])
        number = None
        with contextlib.suppress(ValueError):  # whole numbers of which no type holds all
            number = csv_table.read_table(text, ["number"], []).column("number")
    settings = {"sep": delimiter, "encoding": encoding, "low_memory": False}
    as_texts = pandas.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, **settings)
    assert both.to_pydict() == as_texts[["number", "text"]].to_dict("list")
    if number is not None:
        theirs = pandas.read_csv(io.BytesIO(content), **settings)["number"]
        expected, found = theirs.to_numpy(), number.to_pandas().to_numpy()
        assert found.dtype == expected.dtype or theirs.isna().all() or expected.dtype == object
        if expected.dtype != object:  # numbers beyond 64 bits are texts for pandas
            np.testing.assert_array_equal(found.astype(float), expected.astype(float))


def test_a_column_that_is_left_out_is_not_converted(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(f"a,b\n1,{2**64}\n2,3\n")
    text = csv_text.open_text(str(path), csv_text.Style())
    assert csv_table.read_table(text, ["a"], []).to_pydict() == {"a": [1, 2]}
    with pytest.raises(ValueError, match=r"t\.csv: column 'b' has whole numbers beyond 64 bits"):
        csv_table.read_table(text, ["b", "a"], [])
