"""The tiny experiment, its examples in streams: four shards of unequal sizes, and one that is held out."""

import dataclasses
import os

import tiny_experiment

import jaxdist
from jaxdist import data

SIZES = (13, 9, 20, 10)
TRAIN = tiny_experiment.make_source(sum(SIZES), 0)
HELD_OUT = tiny_experiment.make_source(21, 1)


def open_shard(shard, start):
    return (TRAIN[sum(SIZES[:shard]) + place] for place in range(start, SIZES[shard]))


def open_held_out(shard):
    return (HELD_OUT[place] for place in range(len(HELD_OUT)))


def get_config() -> jaxdist.Experiment:
    length = {"sized": {"sizes": SIZES}, "endless": {"examples_per_epoch": 52}}[os.environ["STREAM_KIND"]]
    train = data.StreamSource(open_shard, num_shards=4, seeks=True, window=16, **length)
    held_out = data.StreamSource(open_held_out, sizes=len(HELD_OUT))
    return dataclasses.replace(tiny_experiment.get_config(), data=jaxdist.Data(train=train, eval=held_out))
