"""CSV files are what pandas reads, or they are refused with a message."""

import bz2
import gzip
import lzma
import math

import hypothesis
import numpy as np
import pandas
import pyarrow
import pytest
from hypothesis import strategies as st

from jaxdist.data import CorruptExample, csv_source


def assert_pandas(path, ours, *, kept=None, **settings):
    theirs = pandas.read_csv(path, **settings)
    assert set(ours.arrays) == set(theirs.columns if kept is None else kept)
    for name, array in ours.arrays.items():
        expected = theirs[name].to_numpy()
        assert array.dtype == expected.dtype, name
        np.testing.assert_array_equal(array, expected)


COLUMNS = st.sampled_from(
    [
        st.integers(-(2**63), 2**63 - 1).map(str),
        st.integers(0, 2**64 - 1).map(str),
        st.floats(allow_nan=False).map(repr),
        st.one_of(st.integers(-99, 99).map(str), st.floats(-1e9, 1e9).map(repr)),
        st.one_of(st.integers(-99, 99).map(str), st.sampled_from(["", "NA", "nan", "NULL"])),
        st.sampled_from(["True", "False"]),
        st.just(""),
    ]
)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_columns_of_numbers_are_pandas(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    num_rows = data.draw(st.integers(1, 8))
    kinds = data.draw(st.lists(COLUMNS, min_size=1, max_size=4))
    columns = [data.draw(st.lists(kind, min_size=num_rows, max_size=num_rows)) for kind in kinds]
    delimiter = data.draw(st.sampled_from([",", ";", "\t", "|"]))
    rows = [delimiter.join([f"c{i}" for i in range(len(columns))] + ["end"])]
    rows += [delimiter.join([*cells, "1"]) for cells in zip(*columns)]
    newline = data.draw(st.sampled_from(["\n", "\r\n"]))
    path.write_bytes((newline.join(rows) + newline * data.draw(st.integers(0, 2))).encode())
    assert_pandas(path, csv_source(path, missing=math.nan), sep=delimiter)


ODD_CELLS = (
    *("+4", "-0", "007", "+9007199254740993", "9223372036854775808", "18446744073709551615", "-9223372036854775808"),
    *("1e+05", ".5", "5.", "1E-3", "1e400", "0.30000000000000004", "inf", "+inf", "1_000", "0x1F", "+0X1f", "1d5"),
    *(
        "+NaN",
        "nan ",
        "-NaN",
        "NAN",
        "1.#QNAN",
        " 1",
        "1 ",
        "$5",
        "1,5",
        "true",
        "yes",
        "--1",
        "+",
        "99999999999999999999",
    ),
)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.lists(st.sampled_from([*ODD_CELLS, "1", "2.5"]), min_size=1, max_size=3).flatmap(
        lambda cells: st.lists(st.sampled_from(cells), min_size=1, max_size=5)
    ),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_a_number_that_is_written_in_an_odd_way_is_pandas_or_refused_and_a_nan_is_missing(
    tmp_path_factory, cells, newline
):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(newline.join(["x;end", *(f"{cell};1" for cell in cells)]).encode())
    try:
        ours = csv_source(path, missing=-1, delimiter=";").arrays["x"]
    except ValueError:
        return
    theirs = pandas.read_csv(path, sep=";")["x"]
    if pandas.api.types.is_numeric_dtype(theirs):
        expected = theirs.to_numpy() if theirs.notna().all() else theirs.fillna(-1).to_numpy()
        assert ours.dtype == expected.dtype
    else:  # pandas takes NaN in other spellings, and some numbers beyond 64 bits among floats, for texts
        expected = np.array([-1.0 if math.isnan(float(cell)) else float(cell) for cell in map(str, theirs)])
    np.testing.assert_array_equal(ours, expected)


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_texts_are_numbered_where_they_are_categories(tmp_path):
    path = write(tmp_path / "t.csv", 'size,name,price\n1,b,0.5\n2,"a, x",1\n3,b,2\n')
    source = csv_source(path, categories=["name"])
    assert source.arrays["name"].tolist() == [1, 0, 1]
    assert source.arrays["name"].dtype == np.int32
    assert source.vocabulary == {"name": ("a, x", "b")}
    assert list(csv_source(path, columns=["size"], categories=["name"]).arrays) == ["size", "name"]
    with pytest.raises(ValueError, match="row 1: column 'name' holds 'b'"):
        csv_source(path)
    with pytest.raises(ValueError, match="no column 'weight'"):
        csv_source(path, columns=["weight"])


def test_held_out_rows_have_the_numbers_of_the_training_rows(tmp_path):
    train = csv_source(write(tmp_path / "a.csv", "x,y\n1,ant\n2,cat\n3,bee\n"), categories=("y",))
    held_out = csv_source(write(tmp_path / "b.csv", "x,y\n1,cat\n2,bee\n"), categories=train.vocabulary)
    assert held_out.arrays["y"].tolist() == [2, 1]
    with pytest.raises(ValueError, match=r"holds \['dog'\], which are not among its known texts"):
        csv_source(write(tmp_path / "c.csv", "x,y\n1,dog\n"), categories=train.vocabulary)
    numbers = csv_source(write(tmp_path / "d.csv", "x,y\n1,01\n2,1\n3,\n"), categories=("y",))
    assert numbers.vocabulary == {"y": ("", "01", "1")}


def test_what_python_but_no_table_takes_for_a_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'1_000', which is not a number"):
        csv_source(write(tmp_path / "t.csv", "a\n1_000\n"))
    for text in ("0xff", " -0XFF"):
        with pytest.raises(ValueError, match=f"'{text}', which is not a number"):
            csv_source(write(tmp_path / "t.csv", f"a\n12\n{text}\n"))
    with pytest.raises(ValueError, match="'2020-01-02', which is not a number"):
        csv_source(write(tmp_path / "t.csv", "a\n2020-01-02\n"))


def test_columns_of_one_name_are_all_kept(tmp_path):
    for header in ("a,b,a,a", "a,a.1,a,a.1", ",,b,", ",Unnamed: 0,b,b"):
        path = write(tmp_path / "t.csv", f"{header}\n1,2,3,4\n")
        assert_pandas(path, csv_source(path))


def test_missing_values_are_refused_unless_it_is_said_what_they_are(tmp_path):
    path = write(tmp_path / "t.csv", "a,b\n1,True\n,\n3,False\n")
    with pytest.raises(ValueError, match="row 2: column 'a' has no value"):
        csv_source(path)
    source = csv_source(path, missing=-1)
    assert source.arrays["a"].tolist() == [1, -1, 3]
    assert source.arrays["b"].tolist() == [1, -1, 0]


def test_the_type_of_a_column_is_that_of_all_its_rows(tmp_path):
    path = write(tmp_path / "t.csv", "a,b\n" + "1,x\n" * 300_000 + "1.5,y\n")
    source = csv_source(path, categories=("b",))
    assert source.arrays["a"].dtype == np.float64
    assert source.arrays["a"][-1] == 1.5


def test_large_cells_comments_encodings_and_headers(tmp_path):
    path = write(tmp_path / "large.csv", f'a,b\n1,"{"x" * 2_000_000}"\n')
    assert len(csv_source(path, categories=("b",)).vocabulary["b"][0]) == 2_000_000
    path = write(tmp_path / "comment.csv", "# by hand\na,b\n# more\n1,2\n\n\n")
    assert_pandas(path, csv_source(path, comment="#"), comment="#")
    path = write(tmp_path / "bom.csv", "\ufeffa;b\n1;2\n")
    assert_pandas(path, csv_source(path), sep=";")
    path = write(tmp_path / "latin.csv", "größe,b\n1,2\n", "latin-1")
    assert_pandas(path, csv_source(path, encoding="latin-1"), encoding="latin-1")
    with pytest.raises(ValueError, match="Name its encoding"):
        csv_source(path)
    path = write(tmp_path / "utf16.csv", "a,b\n1,2\n", "utf-16")
    assert_pandas(path, csv_source(path, encoding="utf-16"), encoding="utf-16")
    path = write(tmp_path / "bare.csv", "1,2\n3,4\n")
    assert_pandas(path, csv_source(path, names=["x", "y"]), names=["x", "y"])
    path = write(tmp_path / "lines.csv", '"a\nb",c\n1,"2"\n')
    assert_pandas(path, csv_source(path))
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n"))
    assert_pandas(tmp_path / "t.csv.gz", csv_source(tmp_path / "t.csv.gz"))


def test_whole_numbers_beyond_64_bits_are_refused(tmp_path):
    path = write(tmp_path / "t.csv", f"a,b\n{2**63},1e300\n5,2\n")
    assert_pandas(path, csv_source(path))
    with pytest.raises(ValueError, match="'a' has whole numbers beyond 64 bits"):
        csv_source(write(tmp_path / "t.csv", f"a\n{2**64}\n"))


def test_rows_of_other_lengths_and_empty_files_are_refused(tmp_path):
    with pytest.raises(CorruptExample, match="Row #3: Expected 2 columns, got 1"):
        csv_source(write(tmp_path / "t.csv", "a,b\n1,2\n3\n"))
    for text in ("", "a,b\n", "\n\n"):
        with pytest.raises(ValueError, match="at least one row"):
            csv_source(write(tmp_path / "t.csv", text))


def test_several_files_are_one_table_of_one_type(tmp_path):
    write(tmp_path / "a.csv", "x,y\n1,2\n")
    write(tmp_path / "b.csv", "x,y\n1.5,3\n")
    source = csv_source(tmp_path)
    assert source.arrays["x"].tolist() == [1, 1.5]
    assert source.arrays["y"].dtype == np.int64
    write(tmp_path / "b.csv", "y,x\n1.5,3\n")
    with pytest.raises(ValueError, match=r"b\.csv has the columns"):
        csv_source(tmp_path)


def test_short_rows_are_refused_or_filled_as_pandas_does(tmp_path):
    path = write(tmp_path / "t.csv", 'a,b,c\n1,2,3\n4\n\n"5",6\n')
    with pytest.raises(CorruptExample, match="Expected 3 columns, got 1"):
        csv_source(path)
    assert_pandas(path, csv_source(path, short_rows="fill", missing=math.nan))
    with pytest.raises(CorruptExample, match="Expected 2 columns, got 3"):
        csv_source(write(tmp_path / "long.csv", "a,b\n1\n1,2,3\n"), short_rows="fill")
    with pytest.raises(ValueError, match="'refuse' or 'fill'"):
        csv_source(path, short_rows="skip")


def test_types_of_later_blocks_and_texts_that_mean_missing_count(tmp_path):
    """The first block of a large file is of whole numbers; behind it come fractions, missing values and texts."""
    head = "a,b,c,d\n" + "1,1,1,1\n" * 150_000
    path = write(tmp_path / "t.csv", head + "0.5,NA,nan,9999999999999999999\n")
    assert_pandas(path, csv_source(path, missing=math.nan), low_memory=False)
    with pytest.raises(ValueError, match="row 150001: column 'b' has no value"):
        csv_source(path, columns=("b",))
    with pytest.raises(ValueError, match="row 150001: column 'a' holds 'x'"):
        csv_source(write(tmp_path / "t.csv", head + "x,1,1,1\n"))


def test_a_header_of_another_width_and_lines_above_it_are_skipped_where_asked(tmp_path):
    path = write(tmp_path / "t.csv", "150,2,cat\n1,2,3,0\n4,5,6,1\n")
    with pytest.raises(CorruptExample, match=r"Expected 3 columns, got 4.*`skip_lines`"):
        csv_source(path)
    names = ["a", "b", "c", "label"]
    assert_pandas(path, csv_source(path, names=names, skip_lines=1), names=names, skiprows=1)
    path = write(tmp_path / "notes.csv", "Source: a survey\n\nx,y\n1,2\n")
    assert_pandas(path, csv_source(path, skip_lines=2), skiprows=2)


def test_a_column_that_is_texts_in_one_file_is_refused_where_it_counts_and_only_there(tmp_path):
    for number, other in enumerate(("7", "see page 7", "True")):
        write(tmp_path / f"{number}.csv", f"x,other\n{number},{other}\n")
    with pytest.raises(ValueError, match=r"'string': '.*1\.csv'"):
        csv_source(tmp_path)
    assert csv_source(tmp_path, columns=["x"]).arrays["x"].tolist() == [0, 1, 2]
    assert csv_source(tmp_path, categories=["other"]).vocabulary["other"] == ("7", "True", "see page 7")


PACKED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda text: pyarrow.Codec("zstd").compress(text, asbytes=True),
}


@pytest.mark.parametrize("suffix", PACKED)
def test_a_compressed_table_is_whole_or_refused(tmp_path, suffix):
    path, packed = tmp_path / f"x.csv{suffix}", PACKED[suffix](b"a,b\n1,2\n" * 3)
    for content, rows in (
        (PACKED[suffix](b"a,b\n") + PACKED[suffix](b"1,2\n3,4\n"), 2),
        (packed[:-3], None),
        (b"?", None),
    ):
        path.write_bytes(content)
        if rows is None:
            with pytest.raises(CorruptExample, match="cannot be decompressed"):
                csv_source(path)
        else:
            assert len(csv_source(path)) == rows


def test_a_wide_table_takes_no_longer_for_each_of_its_columns(tmp_path):
    names, rows = ["x"] * 4000, [["+1.0"] * 4000, ["1e30"] * 4000]
    (tmp_path / "x.csv").write_text("\n".join(map(",".join, [names, *rows])))  # minutes, if each took the whole
    source = csv_source(tmp_path / "x.csv")
    assert len(source.arrays) == 4000
    assert source.arrays["x.3999"].tolist() == [1, 1e30]


@pytest.mark.parametrize(
    ("texts", "settings"),
    [
        (["a\n9007199254740993\n", "a\n0.5\n"], {}),
        (["a\n-1\n", "a\n18446744073709551615\n"], {}),
        (["a,b\n9007199254740993,1\n,2\n"], {"missing": 0}),
    ],
)
def test_whole_numbers_that_would_be_rounded_are_refused_by_column(tmp_path, texts, settings):
    paths = [tmp_path / f"{number}.csv" for number in range(len(texts))]
    for path, text in zip(paths, texts):
        path.write_text(text)
    with pytest.raises(ValueError, match=r"'a'.*not in range.*Write"):
        csv_source(paths, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        *({"delimiter": value} for value in ("::", "", "¦", "\n", '"')),
        *({"skip_lines": value} for value in (-1, 1.0)),
        *({"comment": ""}, {"names": "ab"}, {"short_rows": "cut"}),
    ],
)
def test_a_setting_that_is_none_is_refused(tmp_path, settings):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*; got"):
        csv_source(tmp_path / "x.csv", **settings)
