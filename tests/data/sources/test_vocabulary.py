import unicodedata

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist import data
from jaxdist.data.sources.vocabulary import check_same_vocabulary, listed, vocabulary_of


class Named:
    def __init__(self, **vocabulary):
        self.vocabulary = vocabulary


def test_sources_without_names_agree_with_all():
    assert vocabulary_of(object()) == {}
    shared = check_same_vocabulary([object(), Named(label=["a", "b"]), Named(colour=("red",))], what="Sources")
    assert shared == {"label": ("a", "b"), "colour": ("red",)}


@pytest.mark.parametrize(
    ("other", "number", "names"),
    [
        (("a", "c"), 1, "'b' in one and 'c'"),
        (("a",), 1, "'b' in one and 'no name'"),
        (("b", "a"), 0, "'a' in one and 'b'"),
    ],
)
def test_the_first_number_of_two_meanings_is_named(other, number, names):
    with pytest.raises(ValueError, match=f"Sources must number the names of field 'label' alike: {number} is {names}"):
        check_same_vocabulary([Named(label=("a", "b")), Named(label=other)], what="Sources")


NAMES = st.lists(st.text(max_size=3), max_size=5)


@given(NAMES)
def test_names_keep_their_order_unless_two_look_alike(names):
    if len({unicodedata.normalize("NFC", name) for name in names}) == len(names):
        assert listed(names, what="Classes") == tuple(names)
    else:
        with pytest.raises(ValueError, match="look alike"):
            listed(names, what="Classes")


@pytest.mark.parametrize("names", ["ab", {"a", "b"}, {"a": 1, "b": 0}])
def test_what_has_no_order_of_names_is_refused_wherever_names_are_given(names, tmp_path):
    (tmp_path / "t.csv").write_text("a,b,ab\n1,2,3\n")
    pyarrow.parquet.write_table(pyarrow.table({"a": [1], "ab": ["a"]}), tmp_path / "t.parquet")
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "x.png").touch()
    for call in (
        lambda: data.ImageFolder(tmp_path / "images", classes=names, decode=False),
        lambda: data.csv_source(tmp_path / "t.csv", columns=names),
        lambda: data.csv_source(tmp_path / "t.csv", categories={"a": names}),
        lambda: data.ParquetSource(tmp_path / "t.parquet", columns=names),
        lambda: data.ParquetSource(tmp_path / "t.parquet", categories={"ab": names}),
        lambda: data.MapSource([(1, 2)], names=names),
        lambda: data.StreamSource(lambda shard: [(1, 2)], sizes=1, names=names),
    ):
        with pytest.raises(ValueError, match="a list of names"):
            call()


@pytest.mark.parametrize("own", [["the", "cat"], {"the": 0, "cat": 1}, {0: "the"}, "words.txt"], ids=repr)
def test_a_vocabulary_that_is_something_of_the_users_own_numbers_no_field(own):
    source = Named()
    source.vocabulary = own
    assert vocabulary_of(source) == {}
