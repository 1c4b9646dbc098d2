"""What an experiment may be made of, and what is refused when it is made."""

import dataclasses

import flax.linen as nn
import numpy as np
import optax
import pandas
import pytest
import tiny_experiment
from flax import nnx

import jaxdist
from jaxdist import losses
from jaxdist.errors import ConfigError
from jaxdist.models import mlp

IMAGES, LABELS = np.zeros((4, 2), np.float32), np.arange(4)


class Wide(nn.Module):
    @nn.compact
    def __call__(self, image, train):
        return nn.Dense(2)(image)


REFUSED = {
    "an unknown name": (lambda: jaxdist.Experiment(globl_batch_size=3), "Did you mean 'global_batch_size'?"),
    "a missing name": (lambda: jaxdist.Experiment(name="x"), "needs the required setting 'model'"),
    "a value by position": (lambda: jaxdist.Evaluation(3), "takes its settings by name"),
    "a model's class": (lambda: change(model=mlp.MLP), "Call the class: MLP"),
    "a user's own class": (lambda: change(model=Wide), "Call the class: Wide"),
    "an NNX module": (lambda: change(model=nnx.Linear(2, 2, rngs=nnx.Rngs(0))), "lambda rngs: Linear"),
    "no model at all": (lambda: change(model=3), "takes a Linen module"),
    "an optimizer's name": (lambda: change(optimizer="adam"), "jaxdist.Optimizer(name='adam'"),
    "an optimizer uncalled": (lambda: change(optimizer=optax.adam), "optax.adam(1e-3)"),
    "MultiSteps": (lambda: change(optimizer=optax.MultiSteps(optax.sgd(1.0), 2)), "gradient_transformation()"),
    "no optimizer at all": (lambda: change(optimizer=None), "takes a jaxdist.Optimizer"),
    "a metric's class": (lambda: jaxdist.Evaluation(metrics=(losses.F1,)), "got the class F1"),
    "a set of examples with a slash": (
        lambda: jaxdist.Data(train={"x": IMAGES}, eval={"a/b": {"x": IMAGES}}),
        "without a slash",
    ),
    "a number for a stop rule": (lambda: change(stop=3), "jaxdist.Stop(max_steps=1000)"),
    "a string for a number": (lambda: change(global_batch_size="32"), "takes a whole number; got '32'"),
    "a fraction for a count": (lambda: change(global_batch_size=2.5), "takes a whole number; got 2.5"),
    "a truth for a number": (lambda: change(seed=True), "takes a whole number; got True"),
    "an unknown choice": (lambda: change(reduction="sum"), "takes one of mean, canonical; got 'sum'"),
    "an unknown writer": (lambda: change(writers=("xml",)), "tensorboard, mlflow, trackio, wandb; got 'xml'"),
    "a writer by itself": (lambda: change(writers="jsonl"), "got 'jsonl'"),
    "a dict for a group": (lambda: change(checkpoints={"every_steps": 3}), "takes a Checkpoints"),
    "a loss that is none": (lambda: change(loss="mse"), "Experiment.loss takes a function or None; got 'mse'"),
    "data that is not Data": (lambda: change(data={"train": 1}), "takes a Data"),
    "a path for data": (lambda: jaxdist.Data(train="train.csv"), "got 'train.csv'"),
    "one array": (lambda: jaxdist.Data(train=IMAGES), "a dict of arrays"),
    "three arrays": (lambda: jaxdist.Data(train=(IMAGES, IMAGES, LABELS)), "a pair of arrays"),
    "arrays of two lengths": (lambda: jaxdist.Data(train=(IMAGES, LABELS[:3])), "must share dim 0"),
    "an empty dict": (lambda: jaxdist.Data(train={}), "at least one array"),
    "a column of strings": (lambda: jaxdist.Data(train=pandas.DataFrame({"name": ["a"]})), "Data.train cannot be used"),
    "a stream": (lambda: jaxdist.Data(train=iter([1])), "data.StreamSource("),
}


def change(**changes):
    return dataclasses.replace(tiny_experiment.get_config(), **changes)


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_kind_of_object_is_refused_with_what_to_write(what):
    make, message = REFUSED[what]
    with pytest.raises(ConfigError) as raised:
        make()
    assert message in str(raised.value)


def test_inputs_may_be_a_list():
    assert change(inputs=["image", "label"]).inputs == ("image", "label")


def test_training_and_held_out_data_number_their_names_alike():
    train, held_out = (jaxdist.ArraySource({"label": np.arange(2)}) for _ in range(2))
    train.vocabulary, held_out.vocabulary = {"label": ("cat", "dog")}, {"label": ("dog",)}
    with pytest.raises(ValueError, match="Training and held-out data must number the names of field 'label' alike"):
        jaxdist.Data(train=train, eval=held_out)
    held_out.vocabulary = train.vocabulary
    assert jaxdist.Data(train=train, eval=held_out).eval is held_out


def test_held_out_examples_may_be_several_sets_by_name():
    arrays = {"image": IMAGES, "label": LABELS}
    data = jaxdist.Data(train=arrays, eval={"dicts": arrays, "pairs": (IMAGES, LABELS)})
    assert [len(source) for source in data.eval.values()] == [4, 4]
    assert sorted(data.eval["pairs"].arrays) == ["image", "label"]
    # The arrays of one set are one set.
    assert len(jaxdist.Data(train=arrays, eval=arrays).eval) == 4


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_set_is_not_called_what_the_command_line_calls_all_of_them(name):
    arrays = {"image": IMAGES, "label": LABELS}
    with pytest.raises(ValueError, match=f"`jaxdist eval --data {name}` is something else"):
        jaxdist.Data(train=arrays, eval={name: arrays})
