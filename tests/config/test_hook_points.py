"""What counts as a hook."""

import types

import pytest

from jaxdist.config import hook_points
from jaxdist.errors import ConfigError


class Sample:
    every_steps = 5

    def on_step(self, info):
        pass


async def waits(info):
    pass


def yields(info):
    yield info


async def streams(info):
    yield info


def test_functions_and_objects_with_a_known_method_are_hooks():
    hook_points.check([print, lambda info: None, Sample(), types.SimpleNamespace(on_end=print)])


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (Sample, r"the class Sample\. Write Sample\(\.\.\.\)"),
        (types.SimpleNamespace(on_steps=print), "has on_steps, which is never called. Did you mean 'on_step'"),
        (types.SimpleNamespace(), "or objects with any of on_start"),
        (3, "or objects with any of on_start"),
        (types.SimpleNamespace(on_step=print, every_steps=0), "positive whole number"),
        (types.SimpleNamespace(on_step=print, every_steps=True), "positive whole number"),
        (waits, r"waits \(.*test_hook_points.py:\d+\) is an async function, so that a call would run nothing"),
        (yields, "has a yield"),
        (streams, "is an async function"),
        (types.SimpleNamespace(on_step=print, on_end=waits), "is an async function"),
    ],
)
def test_anything_else_is_refused(hook, message):
    with pytest.raises(ConfigError, match=message):
        hook_points.check([hook])


def test_a_function_is_called_after_steps_alone_and_an_object_where_it_says():
    sample = Sample()
    assert hook_points.method(print, "on_step") is print
    assert hook_points.method(print, "on_end") is None
    assert hook_points.method(sample, "on_step") == sample.on_step
    assert hook_points.method(sample, "on_start") is None
