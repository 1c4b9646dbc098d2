import jax
import pytest
import tiny_experiment

from jaxdist.config import overrides
from jaxdist.errors import ConfigError
from jaxdist.run import components, preflight


@pytest.fixture(scope="module")
def traced():
    experiment = tiny_experiment.get_config()
    parts = components.put_together(experiment, devices=jax.devices()[:1])
    shapes = components.example_batch(parts.loader)
    return experiment, parts.functions, parts.abstract_state, shapes


def check(traced, *assignments, **eval_shapes):
    experiment, functions, abstract, shapes = traced
    held_out = {**shapes, **eval_shapes} if eval_shapes is not None else None
    held_out = {name: shape for name, shape in held_out.items() if shape is not None}
    preflight.check(overrides.override(experiment, assignments), functions, abstract, shapes, {"": held_out}, None)


def test_what_is_right_passes(traced):
    check(traced, "stop.target=0.9", "checkpoints.best_metric=train/accuracy")


def test_held_out_examples_may_have_more_fields_but_not_fewer(traced):
    check(traced, name=jax.ShapeDtypeStruct((16,), "int32"))
    with pytest.raises(ConfigError, match=r"need the fields of the training examples; label is missing"):
        check(traced, label=None)


def test_held_out_examples_of_another_width_are_refused_with_the_place(traced):
    with pytest.raises(
        ConfigError, match=r"evaluation fails on the examples of data\.eval: .*mlp\.py:\d+, in __call__"
    ):
        check(traced, image=jax.ShapeDtypeStruct((16, 3), "float32"))


def test_a_metric_that_never_comes_is_refused_with_the_nearest(traced):
    with pytest.raises(ConfigError, match=r"Did you mean 'eval/accuracy'\?"):
        check(traced, "stop.target=0.9", "stop.target_metric=eval/acuracy")
