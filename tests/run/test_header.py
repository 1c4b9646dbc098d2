import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import tiny_experiment

from jaxdist import data, stop
from jaxdist.run import header
from jaxdist.spmd import mesh


def render(experiment, **changes):
    given = {
        "params": {"w": jnp.zeros((3, 4)), "b": jax.ShapeDtypeStruct((1000,), "float32")},
        "devices": header.describe_devices(mesh.make_mesh(devices=jax.devices()[:2])),
        "share": "8 on each device",
        "steps_per_epoch": 4,
        "run_dir": pathlib.Path("runs/tiny"),
    }
    return dict(line.split("  ", 1) for line in header.render(experiment, **given | changes).splitlines())


def test_the_header_says_what_is_trained_on_what_until_when():
    facts = {name: text.strip() for name, text in render(tiny_experiment.get_config()).items()}
    assert facts == {
        "tiny": "MLP, 1,012 params",
        "devices": "2 x cpu (2 data), data-parallel, reduction mean",
        "batch": "16 examples a step, 8 on each device",
        "data": "52 examples, 4 steps an epoch; 21 held out",
        "ends at": "10 steps",
        "run directory": "runs/tiny",
    }


def test_every_stop_rule_is_named_and_a_resumed_run_says_where_it_continues():
    rules = stop.Stop(target=0.9, patience=3, max_steps=10_000, max_epochs=2, max_seconds=60.0)
    facts = render(dataclasses.replace(tiny_experiment.get_config(), stop=rules), step=7)
    assert facts["ends at"].strip() == (
        "eval/accuracy at least 0.9, 3 evaluations without a better one, 10,000 steps, 2 epochs, 60.0 seconds"
    )
    rules = stop.Stop(patience=3, max_steps=10, target_metric="eval/loss", mode="min")
    facts = render(dataclasses.replace(tiny_experiment.get_config(), stop=rules), step=7)
    assert facts["ends at"].strip() == "3 evaluations without a better eval/loss, 10 steps"
    assert facts["continues"].strip() == "after step 7"


def test_a_number_has_its_noun():
    assert [header.count(number, "worker") for number in (1, 2, 1000)] == ["1 worker", "2 workers", "1,000 workers"]


def test_a_run_that_begins_with_weights_says_which():
    assert render(tiny_experiment.get_config(), began_with="runs/a: 4 leaves loaded")["begins with"].strip() == (
        "runs/a: 4 leaves loaded"
    )


def test_a_stream_that_cannot_give_each_example_once_is_said_to():
    tiny = tiny_experiment.get_config()
    sized = data.StreamSource(lambda shard: tiny.data.train, sizes=52)
    assert "stream" not in render(dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, train=sized)))
    unknown = data.StreamSource(lambda shard: tiny.data.train, num_shards=2, examples_per_epoch=52)
    facts = render(dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, train=unknown)))
    assert "a stream of unknown size, 52 examples an epoch" in facts["stream"]
