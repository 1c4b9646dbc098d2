"""Canonical steps of every strategy beside plain JAX on one device: bits, memory and time.

python benchmarks/same_bits.py [--width N] [--layers N] [--steps N] [--only STRATEGY ...] [--json]

A chain of square matrices is trained by SGD with momentum. The reference uses nothing of this package: a jitted
gradient for each logical shard, the fixed tree of additions, optax in one jitted function, all on one device. Each row
is a strategy on some devices with some logical shards: whether its params have the reference's bits; the most bytes of
live arrays on one device when a stage of the step is done, beside what the strategy itself takes with the mean
(`memory_analysis` of its compiled step) and two vectors of the size of the params; and the milliseconds of a step.
"""

import argparse
import functools
import hashlib
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.rundir import record
from jaxdist.spmd import device_program, state, strategies
from jaxdist.spmd.mesh import Dealing, DealtBatch

ROWS = [
    ("data-parallel", 1, 8),
    ("data-parallel", 4, 8),
    ("zero1", 4, 8),
    ("fsdp", 2, 8),
    ("fsdp", 4, 8),
    ("fsdp", 3, 8),
    ("fsdp", 8, 8),
    ("fsdp", 4, 10),
    ("hsdp", 4, 8),
]
BATCH_SIZE = 80


def init_fn(key: jax.Array, width: int, layers: int) -> dict[str, jax.Array]:
    """Return the matrices."""
    keys = jax.random.split(key, layers)
    return {f"layer_{place:02}": jax.random.normal(keys[place], (width, width)) / width**0.5 for place in range(layers)}


def sum_of_losses(params: Any, batch: Any) -> jax.Array:
    """Return the loss, summed over examples."""
    x = batch["x"]
    for weight in params.values():
        x = jnp.tanh(x @ weight)
    return jnp.sum(jnp.square(x - batch["y"]).mean(axis=1))


def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the same as a mean."""
    del key
    return sum_of_losses(params, batch) / len(batch["x"]), {}


def make_batch(seed: int, width: int) -> dict[str, np.ndarray]:
    """Return one batch."""
    random = np.random.default_rng(seed)
    return {name: random.normal(size=(BATCH_SIZE, width)).astype(np.float32) for name in ("x", "y")}


def sha256(params: Any) -> str:
    """Return the hash of the bytes of all leaves."""
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))).hexdigest()


def reference(params: Any, optimizer: Any, batches: list[Any], logical_shards: int) -> str:
    """Return the hash of the params after plain JAX has made the steps."""
    count = np.float32(BATCH_SIZE)
    gradient = jax.jit(jax.grad(sum_of_losses))
    add = jax.jit(lambda first, second: jax.tree.map(jnp.add, first, second))

    @jax.jit
    def update(params: Any, opt_state: Any, grads: Any, count: Any) -> Any:
        updates, opt_state = optimizer.update(jax.tree.map(lambda grad: grad / count, grads), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for batch in batches:
        shards = zip(*(np.split(field, logical_shards) for field in batch.values()), strict=True)
        sums = [gradient(params, dict(zip(batch, shard, strict=True))) for shard in shards]
        while len(sums) > 1:
            pairs = [add(first, second) for first, second in zip(sums[::2], sums[1::2], strict=False)]
            sums = [*pairs, sums[-1]] if len(sums) % 2 else pairs
        params, opt_state = update(params, opt_state, sums[0], count)
    return sha256(params)


class MostBytes:
    """The most bytes of live arrays on the first device, whenever a stage is done."""

    def __init__(self) -> None:
        self.most = 0
        self._settled = device_program.settled

    def __call__(self, tree: Any, mesh: Any) -> Any:
        """Take the place of `device_program.settled`."""
        self.look()
        return self._settled(tree, mesh)

    def look(self) -> None:
        """Add up what is there."""
        first = jax.devices()[0]
        arrays = [leaf for leaf in jax.live_arrays() if not leaf.is_deleted()]
        held = [shard.data for leaf in arrays for shard in leaf.addressable_shards if shard.device == first]
        self.most = max(self.most, sum({leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in held}.values()))


def own_bytes(name: str, train_state: state.TrainState, batch: Any, optimizer: Any) -> int:
    """Return the memory that the strategy itself takes on a device, with the mean: as XLA says of the compiled step."""
    leaf = jax.tree.leaves(train_state.params)[0]
    mesh = leaf.sharding.mesh
    devices = list(mesh.devices.flat)
    strategy = strategies.build(name, devices=devices, mesh_axes=dict(mesh.shape) if name == "hsdp" else None)
    program: Any = strategy.make_step(loss_fn, optimizer)
    found = program.trace(train_state, batch).lower().compile().memory_analysis()
    return (
        found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    )


def measure(name: str, num_devices: int, logical_shards: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return a row."""
    axes = {"data": 2, "fsdp": num_devices // 2} if name == "hsdp" else None
    strategy = strategies.build(
        name, devices=jax.devices()[:num_devices], mesh_axes=axes, reduction="canonical", logical_shards=logical_shards
    )
    optimizer = optax.sgd(0.1, momentum=0.9)
    make = functools.partial(init_fn, width=options.width, layers=options.layers)
    train_state = state.create_same_state(make, optimizer, mesh=strategy.mesh, seed=0, layout=strategy.layout)
    params, step = jax.device_get(train_state.params), strategy.make_step(loss_fn, optimizer)
    batches = [make_batch(seed, options.width) for seed in range(options.steps)]
    dealing, sharding = Dealing(logical_shards, num_devices), NamedSharding(
        strategy.mesh, PartitionSpec(strategy.batch_axes)
    )  # fmt: skip
    even = jax.device_put(batches[0], sharding) if BATCH_SIZE % num_devices == 0 else None
    even = even or jax.device_put(jax.tree.map(lambda field: field[:78], batches[0]), sharding)
    own, bytes_of_params = (
        own_bytes(name, train_state, even, optimizer), sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    )  # fmt: skip
    del even
    watch, seconds = MostBytes(), []
    for batch in batches:
        if dealing.is_even:
            placed = jax.device_put(batch, sharding)
        else:
            rows = dealing.rows(BATCH_SIZE)
            placed = DealtBatch(
                jax.device_put({field: values[rows] for field, values in batch.items()}, sharding), dealing
            )
        start = time.perf_counter()
        device_program.settled = watch if batch is batches[-1] else watch._settled
        train_state, _ = jax.block_until_ready(step(train_state, placed))
        seconds.append(time.perf_counter() - start)
    device_program.settled = watch._settled
    found = sha256(jax.device_get(train_state.params))
    mib = 2.0**20
    return {
        "name": f"{name}, {num_devices} devices, {logical_shards} logical shards",
        "same_bits": found == reference(params, optimizer, batches, logical_shards),
        "ours": watch.most / mib,
        "theirs": (own + 2 * bytes_of_params) / mib,
        "ratio": watch.most / (own + 2 * bytes_of_params),
        "unit": "MiB on a device / own + two vectors",
        "milliseconds": 1e3 * min(seconds[1:-1] or seconds),
        "repeats": options.steps,
        "versions": record.versions(),
    }


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="+", default=["data-parallel", "zero1", "fsdp", "hsdp"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    for name, num_devices, logical_shards in ROWS:
        if name not in options.only:
            continue
        row = measure(name, num_devices, logical_shards, options)
        bits = "same bits" if row["same_bits"] else "OTHER BITS"
        line = (
            f"{row['name']:<46} {bits:<10} {row['ours']:8.1f} of {row['theirs']:8.1f} MiB  ratio {row['ratio']:.3f}"
            f"{'' if row['ratio'] <= 1 else '  MISSED'}  {row['milliseconds']:8.1f} ms"
        )
        print(json.dumps(row) if options.json else line, flush=True)


if __name__ == "__main__":
    main()
