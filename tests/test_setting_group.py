"""Groups of settings: what fits a type hint, and that every group's own defaults do."""

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest

from jaxdist.config import experiment, parameter_server
from jaxdist.errors import ConfigError
from jaxdist.setting_group import fits, setting_group, show, whole_number

FITS = [
    (int, 3),
    (int, np.int64(3)),
    (float, 3),
    (float, np.float32(0.5)),
    (str, "x"),
    (bool, True),
    (int | None, None),
    (Literal["a", 1], 1),
    (tuple[int, ...], ()),
    (tuple[int, ...], (1, 2)),
    (tuple[str, int], ("x", 1)),
    (dict[str, int], {"data": 2}),
    (Callable[[Any], Any], len),
    (Any, "anything"),
]
DOES_NOT = [
    (int, 3.0),
    (int, True),
    (int, "3"),
    (int, None),
    (float, "0.1"),
    (float, False),
    (str, 3),
    (bool, 1),
    (Literal["a", 1], True),
    (tuple[int, ...], [1]),
    (tuple[int, ...], (1, "2")),
    (tuple[str, int], ("x",)),
    (dict[str, int], {"data": "2"}),
    (Callable[[Any], Any], 3),
]


@pytest.mark.parametrize(("hint", "value"), FITS, ids=str)
def test_a_value_of_the_declared_kind_fits(hint, value):
    assert fits(hint, value)


@pytest.mark.parametrize(("hint", "value"), DOES_NOT, ids=str)
def test_a_value_of_another_kind_does_not_fit(hint, value):
    assert not fits(hint, value)


GROUPS = [each for each in vars(experiment).values() if dataclasses.is_dataclass(each)]


@pytest.mark.parametrize("group", [*GROUPS, parameter_server.ParameterServer], ids=lambda group: group.__name__)
def test_the_defaults_of_a_group_fit_their_own_hints(group):
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        if field.default is not dataclasses.MISSING:
            assert fits(hints[field.name], field.default), field.name


@setting_group
class Sound:
    volume: int
    name: str = "bell"


def test_a_group_is_frozen_and_compares_by_value():
    assert Sound(volume=1) == Sound(name="bell", volume=1) != dataclasses.replace(Sound(volume=1), volume=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sound(volume=1).volume = 2


def test_a_mistake_names_the_group_and_the_way_out():
    for values, message in [
        ({"volum": 1}, "Sound has no setting 'volum'. Did you mean 'volume'?"),
        ({}, "Sound needs the required setting 'volume'. Give it one."),
        ({"volume": "loud"}, "Sound.volume takes a whole number; got 'loud'."),
    ]:
        with pytest.raises(ConfigError) as raised:
            Sound(**values)
        assert str(raised.value) == message


def test_objects_are_shown_by_their_kind_and_long_values_shortened():
    assert show(Sound) == "the class Sound"
    assert show(len) == "the function len"
    assert show(math) == "the module math"
    assert show(Sound(volume=1)) == "an object of the class Sound"
    assert len(show("x" * 999)) == 80


@pytest.mark.parametrize("value", [2.0, np.float32(2), "2", None, True, math.nan, [2], 1])
def test_a_count_is_a_whole_number_that_is_large_enough(value):
    with pytest.raises(ValueError, match="size is a whole number of at least 2; got "):
        whole_number("size", value, least=2)
    assert type(whole_number("size", np.int8(2), least=2)) is int
