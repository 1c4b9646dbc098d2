"""What is of a kind passes whatever it is; what is not is named with its place."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.rundir import json_kinds


class Place(TypedDict):
    step: int
    note: NotRequired[str]


@dataclasses.dataclass
class Row:
    kind: Literal["join", "leave"]
    places: list[Place]
    named: Mapping[str, float | None] = dataclasses.field(default_factory=dict)


PLACE = st.fixed_dictionaries({"step": st.integers(-(2**62), 2**62)}, optional={"note": st.text()})
ROW = st.fixed_dictionaries(
    {"kind": st.sampled_from(["join", "leave"]), "places": st.lists(PLACE, max_size=3)},
    optional={
        "named": st.dictionaries(
            st.text(), st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
        ),
        "of a later version": st.integers(),
    },
)


@given(ROW)
def test_what_fits_passes(row):
    assert json_kinds.misfit(row, Row, "row") is None
    assert json_kinds.misfit([row], tuple[Row, ...], "rows") is None


@given(ROW, st.none() | st.text() | st.lists(st.none()), st.data())
def test_one_value_of_another_kind_is_named(row, value, data):
    row["places"].append({"step": 1})
    place = data.draw(st.integers(0, len(row["places"]) - 1))
    row["places"][place]["step"] = value
    assert json_kinds.misfit(row, Row, "row").startswith(f"row.places.{place}.step must be a whole number, got ")


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ({}, Row, "row lacks kind, places"),
        ({"kind": "stay", "places": []}, Row, "row.kind must be 'join' or 'leave', got 'stay'"),
        ([], Row, "row must be an object, got []"),
        ({}, list[int], "row must be a list, got {}"),
        (math.nan, float, "row must be a number, got nan"),
        (10**400, float | None, f"row must be a number, got 1{'0' * 39}..."),
        (2.0, int, "row must be a whole number, got 2.0"),
        (1, str | None, "row must be text, got 1"),
        (None, bool, "row must be true or false, got None"),
        ({"a": [object]}, Any, None),
    ],
)
def test_the_message_says_the_rule_and_what_was_received(value, kind, said):
    assert json_kinds.misfit(value, kind, "row") == said
