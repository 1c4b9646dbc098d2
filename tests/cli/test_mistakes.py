"""A hundred mistakes that people make, each with its message: one line, exit status 2, and no run directory left.

A row is Python code for one experiment: `change(...)` is the tiny experiment with other settings.
"""

import pathlib

import jax
import pytest
import tiny_experiment

from jaxdist.cli import main
from jaxdist.launch.joining import runtime

pytestmark = pytest.mark.usefixtures("shared_compilations")

HEADER = """
import dataclasses
import flax.linen as nn
import flax.nnx as nnx
import jax.numpy as jnp
import numpy as np
import optax
import jaxdist
import tiny_experiment
from jaxdist import adapters, losses, Checkpoints, Data, Evaluation, Guards, Optimizer, Recovery, Schedule, Stop
from jaxdist.models import mlp

TINY = tiny_experiment.get_config()
IMAGES, LABELS = TINY.data.train.arrays["image"], TINY.data.train.arrays["label"]

def change(**changes):
    return dataclasses.replace(TINY, **changes)

def data(eval=None, **fields):
    return Data(train={"image": IMAGES, "label": LABELS, **fields}, eval=eval, num_threads=0)

def fails(outputs, batch):
    return outputs - batch["image"], {}

def scalar(outputs, batch):
    return outputs.mean(), {}

def reserved(outputs, batch):
    return losses.classification(outputs, batch)[0], {"learning_rate": outputs[:, 0]}

def called_loss(outputs, batch):
    return losses.classification(outputs, batch)[0], {"loss": outputs[:, 0]}

def broken(example, random):
    return {**example, "image": example["picture"]}

def misspelt(outputs, batch):
    return outputs[:, 0] - batch["labl"], {}

def no_tuple(outputs, batch):
    return losses.classification(outputs, batch)[0]

def list_metrics(outputs, batch):
    return outputs[:, 0], [outputs[:, 0]]

def text_metric(outputs, batch):
    return outputs[:, 0], {"state": "good"}

def float_loss(outputs, batch):
    return 0.5, {}

def whole_loss(outputs, batch):
    return (outputs[:, 0] > 0).astype(int), {}

def complex_loss(outputs, batch):
    return outputs[:, 0].astype(complex), {}

def tree_of_values(outputs, batch):
    return {"first": outputs[:, 0]}, {}

def numbered(outputs, batch):
    return outputs[:, 0], {3: outputs[:, 0]}

def one_argument(outputs):
    return outputs[:, 0], {}

def nothing(example, random):
    return None

def ragged(example, random):
    return {**example, "image": example["image"][: random.integers(3, 6)]}

class Rows:
    def __init__(self, width, num_rows=52):
        self.width, self.num_rows = width, num_rows

    def __len__(self):
        return self.num_rows

    def __getitem__(self, index):
        return {"image": IMAGES[0].repeat(self.width(index)), "label": LABELS[index]}

class Refuses(Rows):
    def __getitem__(self, index):
        raise KeyError("row")

class NoParams(nn.Module):
    @nn.compact
    def __call__(self, image, train):
        return image[:, :2]

class TwoOutputs(nn.Module):
    @nn.compact
    def __call__(self, image, train):
        return nn.Dense(2)(image), nn.Dense(2)(image)

class NeverDrops(nn.Module):
    @nn.compact
    def __call__(self, image, deterministic=True):
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=deterministic)(image))

class Deeper(nn.Module):
    @nn.compact
    def __call__(self, image, train):
        return nn.Dense(2)(image) @ jnp.ones((3, 3))

class NoMask(nn.Module):
    @nn.compact
    def __call__(self, image, train):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(image))

def get_config():
    return """

MISTAKES = {
    # What the experiment is made of.
    "change(model=mlp.MLP)": "Call the class",
    "change(model='mlp')": "takes a Linen module",
    "change(model=NeverDrops())": "takes deterministic, which is not given",
    "change(model=NoMask())": "mask",
    "change(model=Deeper())": "in __call__)",
    "change(loss=None)": "needs a loss",
    "change(loss='mse')": "takes a function or None; got 'mse'",
    "change(loss=fails)": "in fails)",
    "change(loss=scalar)": "'loss' is a scalar",
    "change(loss=reserved)": "learning_rate",
    "change(loss=called_loss)": "Rename",
    "change(loss=losses.next_token)": "needs the batch field 'tokens'",
    "change(optimizer='adam')": "jaxdist.Optimizer(name='adam'",
    "change(optimizer=optax.adam)": "optax.adam(1e-3)",
    "change(optimizer=optax.MultiSteps(optax.sgd(1.0), 2))": "gradient_transformation()",
    "change(stop=3)": "jaxdist.Stop(max_steps=1000)",
    "change(data=IMAGES)": "takes a Data",
    "change(inputs='pixels')": "inputs must be fields of the batch",
    "change(inputs=3)": "takes a string or a tuple",
    "change(loss=misspelt)": "The fields of the batch are: image, label, mask.",
    "change(loss=no_tuple)": "returns an array. Change its return statement.",
    "change(loss=list_metrics)": ") returns an array, [",
    "change(loss=text_metric)": "'state' of text_metric",
    "change(loss=float_loss)": "The loss is float_loss (",
    "change(loss=whole_loss)": "is int32",
    "change(loss=complex_loss)": "is complex64",
    "change(loss=numbered)": "returns one named 3",
    "change(loss=one_argument)": "A loss is called as loss(outputs, batch)",
    "change(loss=optax.softmax_cross_entropy)": "A loss is called as loss(outputs, batch)",
    "change(model=NoParams())": "this one has none",
    "change(model=TwoOutputs())": "what the model returns, here (",
    "change(model=lambda: 3)": "callable from nnx.Rngs to an NNX module",
    "change(model=lambda rngs: 3)": "returns an object of the class",
    "change(model=adapters.Functions(None, fails, fails))": "needs three functions",
    "change(model=lambda rngs: nnx.Module())": "Module has no __call__",
    "change(loss=tree_of_values)": "'loss' of tree_of_values",
    "change(inputs=())": "got none. Name one.",
    "change(inputs=('image', 'label'))": "called with its inputs, here image, label and train",
    "change(optimizer=Optimizer('sgd', 0.1))": "takes its settings by name",
    "change(optimizer=Optimizer(name='sgd'))": "needs the required setting 'learning_rate'",
    "change(optimizer=Optimizer(name='sgd', learning_rate='0.1'))": "Optimizer.learning_rate takes a number",
    "change(optimizer=Optimizer(name='sgd', learning_rate=0.1, schedule='cosine'))": "takes a Schedule",
    "change(optimizer=Optimizer(name='sgd', learning_rate=0.1, groups=('bias',)))": "Optimizer.groups takes a tuple",
    "change(optimizer=Optimizer(name='sgd', learning_rate=0.1, schedule=Schedule(warmup='3')))": "Schedule.warmup",
    "change(stop=Stop(steps=10))": "Did you mean 'max_steps'?",
    "change(stop=Stop(max_steps='10'))": "Stop.max_steps takes a whole number or None",
    "change(stop=Stop(max_steps=3, mode='maximum'))": "Stop.mode takes one of max, min",
    "change(stop=Stop(max_seconds=float('nan')))": "stop.max_seconds must be positive; got nan",
    "change(stop=Stop(max_steps=3, target=float('nan')))": "stop.target must be a number",
    # Names and numbers.
    "change(name='../up')": "names the run directory",
    "change(recovery=Recovery(hang_seconds=-1.0))": "recovery.hang_seconds must be positive",
    "change(recovery=Recovery(deadline_seconds=0))": "recovery.deadline_seconds must be positive",
    "change(eval=3)": "takes an Evaluation; got 3",
    "change(writers=['wandbb'])": "Did you mean 'wandb'?",
    "jaxdist.Experiment(globl_batch_size=3)": "Did you mean 'global_batch_size'?",
    "jaxdist.Experiment(name='x')": "needs the required setting 'model'",
    "change(global_batch_size='16')": "takes a whole number; got '16'",
    "change(global_batch_size=0)": "global_batch_size must be at least 1",
    "change(global_batch_size=15)": "14 or 16",
    "change(global_batch_size=64)": "global_batch_size is 64",
    "change(seed=-1)": "from 0 to 4294967295",
    "change(seed=2**32)": "from 0 to 4294967295",
    "change(seed=2**64)": "from 0 to 4294967295",
    "change(seed=1.5)": "takes a whole number",
    "change(strategy='magic')": "There is no strategy 'magic'",
    "change(reduction='sum')": "takes one of mean, canonical",
    "change(precision='float8')": "takes one of float32, bfloat16, float16",
    "change(num_microbatches=0)": "num_microbatches must be at least 1",
    "change(reduction='canonical', logical_shards=0)": "logical_shards must be at least 1",
    "change(reduction='canonical', logical_shards=3)": "multiple of 3 (3 logical shards",
    "change(mesh={'rows': 3})": "mesh",
    "change(log_every=0)": "log_every must be at least 1",
    "change(writers=('xml',))": "A writer is one of console, jsonl, csv",
    "change(writers='jsonl')": "got 'jsonl'",
    "change(writers=('csv', 'csv'))": "each writer once",
    "change(checkpoints={'every_steps': 3})": "takes a Checkpoints",
    "change(checkpoints=Checkpoints(every_steps=0))": "checkpoints.every_steps must be at least 1",
    "change(checkpoints=Checkpoints(best_metric='eval/f1'))": "Did you mean 'eval/",
    "change(eval=Evaluation(every_steps=0))": "eval.every_steps must be at least 1",
    "change(guards=Guards(check_replicas_every=-1))": "guards.check_replicas_every must be at least 0",
    "change(recovery=Recovery(max_fruitless=0))": "recovery.max_fruitless must be at least 1",
    "change(optimizer=Optimizer(name='sgd', learning_rate=-1))": "optimizer.learning_rate must be at least 0",
    "change(optimizer=Optimizer(name='sgd', learning_rate=0.1, momentum=0.9))": "has no effect on sgd",
    "change(optimizer=Optimizer(name='adam', learning_rate=0.1, weight_decay=0.1))": "Use adamw",
    "change(optimizer=optax.lbfgs(0.1))": "without a function that computes the loss again",
    "change(optimizer=Optimizer(name='adamax', learning_rate=0.1, arguments={'b1': 'x'}))": "Correct its arguments",
    "change(optimizer=Optimizer(name='sgd', learning_rate=0.1, groups=(jaxdist.Group(pattern='.', frozen=True),)))": (
        "freeze every one"
    ),
    "change(optimizer=optax.multi_transform({'x': optax.sgd(0.1)}, {'head': 'x'}))": "takes a tree of their structure",
    "change(eval=Evaluation(metrics=losses.F1()))": "Evaluation.metrics takes a tuple",
    "change(eval=Evaluation(metrics=(losses.F1(),)), data=data())": "has no data.eval",
    "change(seed=np.int64(2**33))": "from 0 to 4294967295",
    # When it ends.
    "change(stop=Stop())": "needs a rule that ends it",
    "change(stop=Stop(max_steps=0))": "stop.max_steps must be positive",
    "change(stop=Stop(max_steps=3, patience=-2))": "stop.patience must be positive",
    "change(stop=Stop(target=1.0, target_metric='eval/f1'))": "which this experiment does not report",
    "change(stop=Stop(target=1.0, max_steps=3), data=data())": "has no data.eval",
    "change(stop=Stop(max_steps=9, patience=2, target_metric='train/loss'))": "is no eval/ metric",
    # The data.
    "change(data=Data(train='train.csv'))": "got 'train.csv'",
    "change(data=Data(train=IMAGES))": "a dict of arrays",
    "change(data=Data(train={'image': IMAGES, 'label': LABELS[:5]}))": "must share dim 0",
    "change(data=Data(train={'image': IMAGES[:0], 'label': LABELS[:0]}))": "empty",
    "change(data=data(label=LABELS.astype(np.float32)))": "needs integers in batch['label']; got float32",
    "change(data=data(label=np.eye(2)[LABELS].astype(int)))": "not one-hot rows",
    "change(data=data(name=np.array(['a'] * len(LABELS), dtype=object)))": "'name' holds Python objects",
    "change(data=data(eval={'image': IMAGES[:0], 'label': LABELS[:0]}))": "empty",
    "change(data=data(eval={'image': IMAGES}))": "label is missing",
    "change(data=data(eval={'image': IMAGES[:, :3], 'label': LABELS}))": "The evaluation fails on the examples",
    "change(data=Data(train={'image': IMAGES, 'label': LABELS}, example_fn=broken))": "in broken)",
    "change(data=Data(train={'image': IMAGES}, example_fn=3))": "takes a function or None; got 3",
    "change(data=Data(train=iter([])))": "examples_per_epoch=",
    "change(data=Data(train={'image': IMAGES, 'label': LABELS}, order=3))": "Data.order takes an Order",
    "change(data=Data(train=Refuses(None)))": "KeyError: 'row' (",
    "change(data=Data(train={'image': IMAGES, 'label': LABELS}, example_fn=nothing))": "returns a dict of fields",
    "change(data=Data(train={'image': IMAGES, 'label': LABELS}, example_fn=ragged))": "must have the same fields",
    "change(data=Data(train={'image': IMAGES, 'label': LABELS}, example_fn=lambda e, r: e, num_workers=1))": "lambda",
    "change(data=data(count=LABELS.astype(np.int64) + 2**40))": "devices hold whole numbers as int32",
    "change(data=data(eval=Rows(lambda index: 1 + (index > 31))))": "fails on some examples of data.eval",
    "change(data=data(eval=Rows(lambda index: 1 + index % 2)))": "must have the same fields, shapes",
    # The weights that it begins with.
    "change(init_from='gpt2')": "Nothing is downloaded",
    "change(init_from=tiny_experiment.__file__)": "is none of these",
    "change(init_from=3)": "takes an InitFrom or a string or None; got 3",
    "change(init_from=jaxdist.InitFrom(path='x', fresh=('(',)))": "must be a regular expression",
    "change(init_from=jaxdist.InitFrom(path='x', rules=(jaxdist.WeightRule(pattern='x'),)))": "does nothing",
    # The file itself.
    "{'seed': 0}": "must return a jaxdist.Experiment",
    "undefined_name": "NameError: name 'undefined_name' is not defined",
    "change(": "cannot be loaded: SyntaxError",
}


def test_the_table_is_long_enough():
    assert len(MISTAKES) >= 100


@pytest.mark.parametrize("code", MISTAKES)
def test_a_mistake_is_one_message_and_leaves_no_run_directory(code, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "start", lambda num_devices=None, threads=None: jax.devices()[: num_devices or 1])
    monkeypatch.syspath_prepend(str(pathlib.Path(tiny_experiment.__file__).parent))
    experiment = tmp_path / "mistaken.py"
    experiment.write_text(HEADER + code + "\n")
    run_dir = tmp_path / "run"
    assert main.run(["train", str(experiment), "--devices", "2", "--run-dir", str(run_dir)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert MISTAKES[code] in shown.err
    assert shown.err.startswith("jaxdist: ")
    assert shown.err.count("\n") == 1 or "There is no strategy" in shown.err
    assert not run_dir.exists()
