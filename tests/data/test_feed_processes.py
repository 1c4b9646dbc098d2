"""The global batch on real processes: the same array, row by row, as in one process."""

import hashlib
import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxdist import testing
from jaxdist.data import ArraySource, Loader, feed, process_rows
from jaxdist.data.placement import host_shards
from jaxdist.data.sources.combine import Sharded, ShardList

NUM_EXAMPLES, BATCH_SIZE, NUM_EPOCHS = 45, 8, 2
FIELDS = ("id", "noise", "mask")


def augment(example, random):
    return {"id": example["id"], "noise": random.random(3, np.float32)}


def make_loader(num_workers=0):
    source = ArraySource({"id": np.arange(NUM_EXAMPLES, dtype=np.int32)})
    return Loader(
        source,
        global_batch_size=BATCH_SIZE,
        seed=4,
        num_epochs=NUM_EPOCHS,
        example_fn=augment,
        num_threads=2,
        num_workers=num_workers,
    )


def make_shard(number):
    return ArraySource({"id": np.arange(100 * number, 100 * number + 5 + number % 3, dtype=np.int32)})


def make_sharded_loader(numbers):
    source = Sharded(
        {number: make_shard(number) for number in numbers}, ShardList.of([make_shard(n) for n in range(4)])
    )
    return Loader(
        source, shuffle=source.order(), global_batch_size=BATCH_SIZE, seed=4, num_epochs=2, example_fn=augment
    )


def digest(row):
    return hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest()[:12]


def make_mesh(axes):
    devices = np.array(jax.devices()).reshape(list(axes.values()))
    return jax.sharding.Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def feed_here(axes, sharded, num_workers):
    """Return, for each step, this process's rows (by number: the fields' digests), the position, and the true count."""
    mesh = make_mesh(axes)
    loader = make_sharded_loader(host_shards(mesh, 4)) if sharded else make_loader(num_workers)
    count = jax.jit(lambda mask: mask.sum())
    steps = []
    for batch, position in feed(loader, mesh):
        rows = {}
        for name in FIELDS:
            for shard in batch[name].addressable_shards:
                for row, value in zip(range(BATCH_SIZE)[shard.index[0]], np.asarray(shard.data)):
                    rows.setdefault(row, {})[name] = digest(value)
        steps.append([rows, position.to_json(), int(count(batch["mask"]))])
    return {"steps": steps, "rows": process_rows(mesh, BATCH_SIZE).tolist()}


def expected_steps(sharded):
    loader = make_sharded_loader(range(4)) if sharded else make_loader()
    for batch, position in loader:
        rows = {str(row): {name: digest(batch[name][row]) for name in FIELDS} for row in range(BATCH_SIZE)}
        yield rows, position.to_json(), int(batch["mask"].sum())


@pytest.mark.parametrize(
    ("processes", "axes", "sharded", "num_workers"),
    [
        (2, {"data": 4}, False, 2),
        pytest.param(4, {"data": 4}, False, 0, marks=pytest.mark.slow),
        (2, {"model": 2, "data": 2}, False, 0),  # every process holds the whole batch
        (2, {"data": 2, "model": 2}, True, 0),
    ],
    ids=str,
)
def test_the_global_batch_is_the_same_on_any_number_of_processes(processes, axes, sharded, num_workers):
    devices = math.prod(axes.values()) // processes
    found = testing.run_processes(feed_here, axes, sharded, num_workers, processes=processes, devices=devices)
    held = {"data": BATCH_SIZE // processes}.get(next(iter(axes)), BATCH_SIZE)
    assert all(len(result["rows"]) == held for result in found)
    expected = list(expected_steps(sharded))
    for result in found:
        assert len(result["steps"]) == len(expected)
    for step, (rows, position, count) in enumerate(expected):
        seen = {}
        for result in found:
            their_rows, their_position, their_count = result["steps"][step]
            assert (their_position, their_count) == (position, count)
            for row, digests in their_rows.items():
                assert seen.setdefault(row, digests) == digests
        assert seen == rows
