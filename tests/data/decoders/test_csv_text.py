"""What is read of a CSV file before its cells: its text, its delimiter, and the names of its columns."""

import io

import hypothesis
import pandas
import pytest
from hypothesis import strategies as st

from jaxdist.data.decoders import csv_text


def opened(path, content, **style):
    path.write_bytes(content)
    return csv_text.open_text(str(path), csv_text.Style(**style))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("others", [b"\n", b"\r\n", b"\r"])
def test_the_header_ends_with_its_line_however_the_others_end(tmp_path, end, others):
    text = opened(tmp_path / "t.csv", b'"a";"two\n,lines"' + end + b"1,5;2" + others)
    assert (text.delimiter, text.names) == (";", ["a", "two\n,lines"])
    with pytest.raises(ValueError, match="at least one row"):
        opened(tmp_path / "t.csv", b"a;b" + end + others)


@pytest.mark.parametrize(
    ("content", "style", "kept"),
    [
        (b'# 5" pipe\na,b\r# x;"\n1,"two\n# lines"\n3,5" pipe\n#z\n4,"6"" p"\n#', {"comment": "#"},
         b'a,b\r1,"two\n# lines"\n3,5" pipe\n4,"6"" p"\n'),
        (b'a\n1\n  \n" "\n"x\n  \ny"\n\t\n2\n', {}, b'a\n1\n" "\n"x\n  \ny"\n2\n'),
        (b"a\n1\n\t\n", {"delimiter": "\t"}, b"a\n1\n\t\n"),
        (b"a,b\n1,2\n  \n", {}, b"a,b\n1,2\n  \n"),
        (b"a,b\n1,2\n  \n\n3\n", {"short_rows": "fill"}, b"a,b\n1,2\n3,\n"),
        (b"from a survey\r\ra,b\r1,2\r", {"skip_lines": 2}, b"a,b\r1,2\r"),
        (b'"a,b";c\n1;2', {}, b'"a,b";c\n1;2'),
    ],
)  # fmt: skip
def test_lines_that_are_no_rows_are_left_out_and_lines_of_a_quoted_cell_stay(tmp_path, content, style, kept):
    text = opened(tmp_path / "t.csv", content, **style)
    assert text.data == kept
    assert "\n" not in "".join(text.names)


def test_a_quote_that_is_never_closed_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"t\.csv has a cell that cannot be read.*quote"):
        opened(tmp_path / "t.csv", b'a,"b\n' + b"1,2\n" * 100_000)


@hypothesis.given(st.lists(st.sampled_from(["a", "a.1", "a.2", "b", "b.1", ""]), min_size=1, max_size=9))
def test_names_of_columns_are_made_distinct_as_pandas_does(names):
    hypothesis.assume(any(names))
    text = ",".join(names) + "\n" + ",".join("1" * len(names)) + "\n"
    assert csv_text.distinct(names) == pandas.read_csv(io.StringIO(text)).columns.tolist()


@pytest.mark.parametrize("header", ["5.1,3.5", "3", "1,1", "-1,0"])
def test_a_header_that_is_a_row_of_numbers_is_told(tmp_path, header):
    (tmp_path / "x.csv").write_text(f"{header}\n1,2\n")
    with pytest.warns(UserWarning, match=rf"x\.csv: the first line, {header[0]}.* holds numbers.*give `names`"):
        csv_text.open_text(str(tmp_path / "x.csv"), csv_text.Style())
    csv_text.open_text(str(tmp_path / "x.csv"), csv_text.Style(names=["a", "b"]))


@pytest.mark.parametrize("header", ["0,1,2", "1,2", "label,1,2", "0", "a"])
def test_names_that_number_the_columns_are_names(tmp_path, header):
    (tmp_path / "x.csv").write_text(f"{header}\n1,2\n")
    csv_text.open_text(str(tmp_path / "x.csv"), csv_text.Style())
