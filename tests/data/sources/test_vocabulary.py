import pytest

from jaxdist.data.sources.vocabulary import check_same_vocabulary, vocabulary_of


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
