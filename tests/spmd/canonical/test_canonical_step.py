import contextlib
import functools
import gc

import compile_cache
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_problem import (
    OPTIMIZERS,
    assert_close,
    counted_compiles,
    example_losses,
    fingerprint,
    init_params,
    loss_fn,
    new_state,
    numpy_batch,
    place,
)

from jaxdist import adapters, losses
from jaxdist.guards import recompile
from jaxdist.models import cnn, gpt, mlp
from jaxdist.spmd import device_program
from jaxdist.spmd import layout as layouts
from jaxdist.spmd import state as states
from jaxdist.spmd import step as steps
from jaxdist.spmd.canonical import adding, canonical_step, state_update
from jaxdist.spmd.mesh import Dealing, DealtBatch, make_mesh

LAYOUTS = (1, 2, 4, 8)
UNEVEN = (3, 5, 6, 7)
BATCH_SIZE = 16
MASK = (np.arange(BATCH_SIZE) < 13).astype(np.float32)
"""Ragged: with eight logical shards, one of them is padding alone and one has a single example."""


def images(seed):
    random = np.random.default_rng(seed)
    return {
        "image": random.normal(size=(BATCH_SIZE, 8, 8, 1)).astype(np.float32),
        "label": random.integers(0, 10, BATCH_SIZE).astype(np.int32),
        "mask": MASK,
    }


def tokens(seed):
    return {"tokens": np.random.default_rng(seed).integers(0, 32, (BATCH_SIZE, 12)).astype(np.int32), "mask": MASK}


MODELS = {
    "cnn": (
        adapters.linen(cnn.CNN(10, width=4, num_stages=1), losses.classification, images(0)),
        images,
        optax.sgd(0.1, momentum=0.9),
    ),
    "cnn with batch norm": (
        adapters.linen(cnn.CNN(10, width=4, num_stages=1, batch_norm=True), losses.classification, images(0)),
        images,
        OPTIMIZERS["adamw"],
    ),
    "gpt with dropout": (
        adapters.linen(
            gpt.GPT(32, 12, num_layers=1, num_heads=2, width=16, dropout_rate=0.1),
            losses.next_token,
            tokens(0),
            inputs="tokens",
        ),
        tokens,
        optax.chain(OPTIMIZERS["adamw"], optax.ema(0.9)),
    ),
}


def dealt(batch, mesh, logical_shards):
    """The batch on the mesh, as `data.feed` places it for so many logical shards."""
    dealing = Dealing(logical_shards, mesh.size)
    if dealing.is_even:
        return place(batch, mesh, "data")
    rows = dealing.rows(len(next(iter(batch.values()))))
    return DealtBatch(place({name: field[rows] for name, field in batch.items()}, mesh, "data"), dealing)


def train(functions, batches, optimizer, num_devices, logical_shards=8):
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    step = canonical_step.canonical_step(functions.loss_fn, optimizer, mesh, logical_shards=logical_shards)
    state = states.create_state(functions.init_fn, optimizer, mesh=mesh, seed=0)
    for batch in batches:
        state, step_metrics = step(state, dealt(batch, mesh, logical_shards))
    return jax.device_get((state.params, state.model_state, state.opt_state, step_metrics))


def assert_same_bits(model, layouts):
    """Of params, statistics, optimizer state, loss and metrics."""
    functions, make_batch, optimizer = MODELS[model]
    batches = [make_batch(seed) for seed in range(4)]
    results = {num_devices: train(functions, batches, optimizer, num_devices) for num_devices in layouts}
    assert len({fingerprint(result) for result in results.values()}) == 1
    start = functions.init_fn(jax.random.split(jax.random.key(0))[0])
    params = start[0] if results[1][1] is not None else start
    assert fingerprint(results[1][0]) != fingerprint(params), "nothing was trained"


@pytest.mark.parametrize(
    ("model", "layouts"),
    [
        pytest.param("cnn", (1, 4), marks=pytest.mark.slow),
        ("cnn with batch norm", (1, 3, 8)),
        pytest.param("gpt with dropout", (1, 8), marks=pytest.mark.slow),
    ],
)
def test_the_same_bits_on_one_device_and_on_several(model, layouts):
    assert_same_bits(model, layouts)


@pytest.mark.soak
@pytest.mark.parametrize("model", MODELS)
def test_the_same_bits_on_every_number_of_devices(model):
    assert_same_bits(model, LAYOUTS + UNEVEN)


@functools.cache
def small_canonical_step(num_devices, logical_shards, num_microbatches=1):
    return canonical_step.canonical_step(
        loss_fn,
        OPTIMIZERS["adamw"],
        make_mesh(devices=jax.devices()[:num_devices]),
        logical_shards=logical_shards,
        num_microbatches=num_microbatches,
    )


def small_train(step, num_devices):
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    return small_train_dealt(step, mesh, lambda batch: place(batch, mesh, "data"))


def small_train_dealt(step, mesh, place_batch):
    state = new_state(OPTIMIZERS["adamw"], mesh)
    for seed in range(3):
        state, step_metrics = step(state, place_batch(numpy_batch(seed, mask=np.arange(32) < 21)))
    return jax.device_get((state.params, state.opt_state, step_metrics))


@pytest.mark.parametrize(
    ("logical_shards", "num_microbatches"),
    [(4, 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((16, 1), (8, 2)))],
)
def test_the_number_of_logical_shards_and_microbatches_is_free(logical_shards, num_microbatches):
    layouts = [num_devices for num_devices in LAYOUTS if num_devices <= logical_shards]
    results = [small_train(small_canonical_step(each, logical_shards, num_microbatches), each) for each in layouts]
    assert len({fingerprint(result) for result in results}) == 1


@pytest.mark.parametrize(
    ("logical_shards", "layouts"),
    [(4, (1, 3)), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((8, (1, 3, 5, 6, 7)), (16, (1, 6, 7))))],
)
def test_any_number_of_devices_gives_the_same_bits(logical_shards, layouts):
    results = set()
    for num_devices in layouts:
        mesh, step = make_mesh(devices=jax.devices()[:num_devices]), small_canonical_step(num_devices, logical_shards)
        deal = functools.partial(dealt, mesh=mesh, logical_shards=logical_shards)
        results.add(fingerprint(small_train_dealt(step, mesh, deal)))
    assert len(results) == 1


@pytest.mark.slow
def test_a_number_of_logical_shards_that_is_no_power_of_two_gives_the_same_bits():
    """With six shards of eight images, several shards in one program gave another last bit of the loss."""
    functions, _, optimizer = MODELS["cnn with batch norm"]
    random = np.random.default_rng(0)
    batch = {
        "image": random.normal(size=(48, 8, 8, 1)).astype(np.float32),
        "label": random.integers(0, 10, 48).astype(np.int32),
        "mask": (np.arange(48) < 34).astype(np.float32),
    }
    found = {each: fingerprint(train(functions, [batch] * 3, optimizer, each, 6)) for each in (1, 2, 4, 5, 6)}
    assert len(set(found.values())) == 1, found


def test_a_batch_that_is_not_dealt_is_refused():
    """Divided evenly over three devices, it would be cut in other places than between logical shards."""
    mesh = make_mesh(devices=jax.devices()[:3])
    step = canonical_step.canonical_step(loss_fn, OPTIMIZERS["adamw"], mesh)
    batch = place(
        {name: np.resize(field, (72, *field.shape[1:])) for name, field in numpy_batch().items()}, mesh, "data"
    )
    with pytest.raises(
        ValueError, match=r"8 logical shards on 3 devices. Place it by data.feed\(loader, mesh, logical"
    ):
        step(new_state(OPTIMIZERS["adamw"], mesh), batch)
    for other in (Dealing(16, 3), Dealing(8, 5)):
        with pytest.raises(ValueError, match="not placed for 8 logical shards on 3 devices"):
            step(new_state(OPTIMIZERS["adamw"], mesh), DealtBatch(batch, other))


def test_close_to_the_mean_reduction():
    mesh = make_mesh()
    mean = small_train(steps.data_parallel_step(loss_fn, OPTIMIZERS["adamw"], mesh), 8)
    assert_close(small_train(small_canonical_step(8, 8), 8), mean, tolerance=2e-6)


def test_logical_shards_have_keys_of_their_own():
    def noise_loss(params, batch, key):
        del batch
        noise = jax.random.uniform(key)
        return params["w"] * 0, {"noise": noise, "square": noise**2}

    mesh = make_mesh(devices=jax.devices()[:2])
    optimizer = optax.sgd(0.1)
    state = states.create_state(lambda key: {"w": jnp.ones(())}, optimizer, mesh=mesh, seed=0)
    key = jax.random.fold_in(state.key, state.step)
    expected = jnp.array([jax.random.uniform(jax.random.fold_in(key, index)) for index in range(8)])
    _, step_metrics = canonical_step.canonical_step(noise_loss, optimizer, mesh)(
        state, place(numpy_batch(), mesh, "data")
    )
    assert_close(step_metrics["noise"], expected.mean())
    assert_close(step_metrics["square"], jnp.square(expected).mean())


def test_everything_compiles_at_the_first_step():
    mesh = make_mesh(devices=jax.devices()[:4])
    step = canonical_step.canonical_step(loss_fn, OPTIMIZERS["adamw"], mesh)
    state = new_state(OPTIMIZERS["adamw"], mesh)
    batches = [place(numpy_batch(seed), mesh, "data") for seed in range(3)]
    with counted_compiles() as first:
        state, _ = step(state, batches[0])
    with counted_compiles() as later:
        for batch in batches[1:]:
            state, _ = step(state, batch)
    assert later == []
    # The split, the sums of a shard, the additions of a device's shards, the tree over devices, the update.
    assert len(first) <= 5, first


@contextlib.contextmanager
def counted_cache_misses():
    """Give a function that counts the programs compiled so far, not read from the persistent cache, by JAX itself."""
    events = []
    request, hit = (f"/jax/compilation_cache/{name}" for name in ("compile_requests_use_cache", "cache_hits"))

    def listen(event, **details):
        events.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield lambda: events.count(request) - events.count(hit)
    finally:
        jax.monitoring.unregister_event_listener(listen)


@pytest.mark.parametrize("is_small", [True, False])
def test_the_loss_is_traced_once(is_small, request):
    if not is_small:
        request.getfixturevalue("no_size_is_small")
    calls = []

    def counted(params, batch, key):
        calls.append(key)
        return example_losses(params, batch).mean(), {}

    optimizer, mesh = optax.sgd(0.1), make_mesh(devices=jax.devices()[:2])
    step = canonical_step.canonical_step(counted, optimizer, mesh)
    batch = {name: field for name, field in numpy_batch().items() if name != "mask"}  # which a trace of its own checks
    step(new_state(optimizer, mesh), place(batch, mesh, "data"))
    assert len(calls) == 1


def test_a_second_start_compiles_nothing_and_gives_the_same_bits(tmp_path, monkeypatch):
    """A restart after a crash does not wait for the compiler, on another number of devices either, except for the one
    program of all shards of a small model.
    """
    monkeypatch.setattr(adding, "SMALL_SIZE", 0)
    hashes, num_compiles = set(), []
    with compile_cache.compile_once(tmp_path):
        for num_devices in (2, 1, 4, 2):
            mesh = make_mesh(devices=jax.devices()[:num_devices])
            step = canonical_step.canonical_step(loss_fn, OPTIMIZERS["adamw"], mesh)
            state, batch = new_state(OPTIMIZERS["adamw"], mesh), place(numpy_batch(), mesh, "data")
            with counted_cache_misses() as by_jax, counted_compiles() as compiles:
                state, _ = step(state, batch)
            num_compiles.append(sum(name in ("jit__sums_of_shard", "jit_update") for name in compiles))
            hashes.add(fingerprint(jax.device_get(state.params)))
    assert len(hashes) == 1
    # The programs of a shard and of the update are compiled by the first start, for all numbers of devices.
    assert num_compiles == [2, 0, 0, 0]
    # What a start on as many devices has compiled before, JAX itself reads from the cache, too.
    assert by_jax() == 0


def test_the_sentinel_counts_one_compile_without_looking_at_every_argument():
    mesh, sentinel = make_mesh(devices=jax.devices()[:2]), recompile.RecompileSentinel()
    step = small_canonical_step(2, 16)
    state, batch = new_state(OPTIMIZERS["adamw"], mesh), place(numpy_batch(), mesh, "data")
    for _ in range(2):
        before = state
        state, _ = step(before, batch)
        assert sentinel.observe(step, (before, batch)) is None
    assert (sentinel.compile_count, step._cache_size()) == (1, 1)


def test_the_state_is_donated():
    mesh = make_mesh(devices=jax.devices()[:2])
    state = new_state(OPTIMIZERS["adamw"], mesh)
    small_canonical_step(2, 16)(state, place(numpy_batch(), mesh, "data"))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_the_order_of_the_devices_changes_no_bit():
    reverse = make_mesh(devices=jax.devices()[3::-1])
    state = new_state(OPTIMIZERS["adamw"], reverse)
    step = canonical_step.canonical_step(loss_fn, OPTIMIZERS["adamw"], reverse, logical_shards=16)
    for seed in range(3):
        state, _ = step(state, place(numpy_batch(seed, mask=np.arange(32) < 21), reverse, "data"))
    assert fingerprint(jax.device_get(state.params)) == fingerprint(small_train(small_canonical_step(4, 16), 4)[0])


def test_a_nonfinite_shard_leaves_the_state_alone():
    mesh = make_mesh(devices=jax.devices()[:2])
    step = small_canonical_step(2, 16)
    state = new_state(OPTIMIZERS["adamw"], mesh)
    before = jax.device_get((state.step, state.params, state.opt_state))
    batch = numpy_batch()
    batch["y"][20] = np.inf
    state, step_metrics = step(state, place(batch, mesh, "data"))
    assert int(step_metrics["nonfinite_leaf"]) == 0
    state = steps.unmarked(state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.step, state.params, state.opt_state)), before)


def reference(optimizer, batches, logical_shards):
    """Params after some steps by plain JAX on one device: a gradient for each shard, the fixed tree, plain optax."""

    @jax.jit
    def sums_of(params, shard):
        grads = jax.grad(lambda params: jnp.sum(example_losses(params, shard) * shard["mask"]))(params)
        return grads, jnp.sum(shard["mask"])

    @jax.jit
    def update(params, opt_state, grads, count):
        updates, opt_state = optimizer.update(jax.tree.map(lambda grad: grad / count, grads), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    add = jax.jit(lambda first, second: jax.tree.map(jnp.add, first, second))
    params = jax.device_get(new_state(optimizer, make_mesh(devices=jax.devices()[:1])).params)
    opt_state = optimizer.init(params)
    for batch in batches:
        shards = [dict(zip(batch, part, strict=True)) for part in zip(
            *(np.split(field, logical_shards) for field in batch.values()), strict=True
        )]  # fmt: skip
        sums = [sums_of(params, shard) for shard in shards]
        while len(sums) > 1:
            pairs = [add(first, second) for first, second in zip(sums[::2], sums[1::2], strict=False)]
            sums = [*pairs, sums[-1]] if len(sums) % 2 else pairs
        params, opt_state = update(params, opt_state, *sums[0])
    return jax.device_get(params)


SHARDED = {
    "zero1": (lambda devices: {"data": devices}, lambda mesh: layouts.zero1(mesh, min_size=8)),
    "fsdp": (lambda devices: {"data": devices}, lambda mesh: layouts.fsdp(mesh, min_size=8)),
    "hsdp": (
        lambda devices: {"data": 2, "fsdp": devices // 2},
        lambda mesh: layouts.fsdp(mesh, axis="fsdp", min_size=8),
    ),
}


def train_sharded(strategy, optimizer, batches, num_devices, logical_shards, num_microbatches=1):
    """Everything that steps of a sharded state make."""
    make_axes, make_layout = SHARDED[strategy]
    mesh = make_mesh(make_axes(num_devices), devices=jax.devices()[:num_devices])
    axes, layout, dealing = tuple(mesh.axis_names), make_layout(mesh), Dealing(logical_shards, num_devices)
    state = states.create_same_state(init_params, optimizer, mesh=mesh, seed=0, layout=layout)
    step = canonical_step.canonical_step(
        loss_fn, optimizer, mesh, logical_shards=logical_shards, num_microbatches=num_microbatches, layout=layout,
        batch_axes=axes,
    )  # fmt: skip
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    for batch in batches:
        if dealing.is_even:
            given = place(batch, mesh, *axes)
        else:
            rows = dealing.rows(len(batch["y"]))
            given = DealtBatch(place({name: field[rows] for name, field in batch.items()}, mesh, *axes), dealing)
        state, metrics = step(state, given)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == placed
    return jax.device_get((state.params, state.opt_state, metrics))


def batches_of(size):
    masks = np.arange(size) < 2 * size // 3
    return [
        {name: field[:size] for name, field in numpy_batch(seed, mask=np.resize(masks, 32)).items()} for seed in (0, 1)
    ]


@pytest.fixture
def no_size_is_small(monkeypatch):
    """Vectors are added in slices and blocks, and states updated in turns, however small they are."""
    monkeypatch.setattr(adding, "SMALL_SIZE", 0)
    monkeypatch.setattr(adding, "BLOCK_SIZE", 96)
    monkeypatch.setattr(state_update, "WHOLE_BYTES", 0)


def test_a_sharded_state_has_the_bits_of_plain_jax_on_one_device(no_size_is_small):
    batches = batches_of(32)
    params, _, _ = train_sharded("fsdp", OPTIMIZERS["momentum"], batches, 4, 8)
    assert fingerprint(params) == fingerprint(reference(OPTIMIZERS["momentum"], batches, 8))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*whole on every device")
@pytest.mark.parametrize(("strategy", "num_devices"), [("hsdp", 4), ("zero1", 3), ("fsdp", 3)])
def test_a_sharded_state_has_the_bits_of_one_device(strategy, num_devices, no_size_is_small):
    args = OPTIMIZERS["adamw"], batches_of(32)
    found = train_sharded(strategy, *args, num_devices, 8, num_microbatches=2)
    assert fingerprint(found) == fingerprint(train_sharded("fsdp", *args, 1, 8, num_microbatches=2))


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*whole on every device:UserWarning")
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_strategy_on_any_devices_with_any_shards_has_the_bits_of_plain_jax(data, no_size_is_small):
    strategy = data.draw(st.sampled_from(sorted(SHARDED)))
    num_devices = data.draw(st.sampled_from((2, 4, 6, 8) if strategy == "hsdp" else (1, 2, 3, 4, 5, 6, 7, 8)))
    logical_shards = data.draw(st.sampled_from([each for each in (4, 5, 8, 10, 16) if each >= num_devices]))
    batches = batches_of(30 if logical_shards in (5, 10) else 32)
    params, _, _ = train_sharded(strategy, OPTIMIZERS["momentum"], batches, num_devices, logical_shards)
    assert fingerprint(params) == fingerprint(reference(OPTIMIZERS["momentum"], batches, logical_shards))


def bytes_held(device):
    """Bytes of all live arrays on one device; some arrays are parts of others, and count once."""
    held = {shard.data.unsafe_buffer_pointer(): shard.data.nbytes
            for leaf in jax.live_arrays() if not leaf.is_deleted()
            for shard in leaf.addressable_shards if shard.device == device}  # fmt: skip
    return sum(held.values())


@pytest.mark.slow
def test_memory_is_that_of_the_shards_and_two_vectors(no_size_is_small, monkeypatch):
    """Of live arrays on one device, whenever a stage is done."""
    width, layers, most = 256, 8, 0
    gc.collect()
    of_other_tests = bytes_held(jax.devices()[0])
    mesh = make_mesh(devices=jax.devices()[:4])
    layout, optimizer = layouts.fsdp(mesh), optax.adam(1e-3)

    def init(key):
        return {f"{number}": jax.random.normal(key, (width, width)) / 16 for number in range(layers)}

    def loss(params, batch, key):
        x = batch["x"]
        for weight in params.values():
            x = jnp.tanh(x @ weight)
        return jnp.square(x).mean(), {}

    def settled(tree, mesh):
        nonlocal most
        jax.block_until_ready(tree)
        most = max(most, bytes_held(jax.devices()[0]) - of_other_tests)
        return tree

    state = states.create_state(init, optimizer, mesh=mesh, seed=0, layout=layout)
    batch = place({"x": np.ones((8, width), np.float32)}, mesh, "data")
    step = canonical_step.canonical_step(loss, optimizer, mesh, layout=layout)
    monkeypatch.setattr(device_program, "settled", settled)
    for _ in range(2):
        state, _ = step(state, batch)
    vector = 4 * layers * width * width
    own = 4 * vector // 4  # params, two moments and gradients
    assert vector < most <= own + 2 * vector + vector // 8


class Statistics(linen.Module):
    """Statistics of the batch and dropout, without convolutions."""

    @linen.compact
    def __call__(self, x, train, mask=None):
        x = linen.Dense(24)(x.reshape(len(x), -1))
        rows = None if mask is None else mask[:, None] > 0
        x = linen.relu(linen.BatchNorm(use_running_average=not train)(x, mask=rows))
        return linen.Dense(10)(linen.Dropout(0.2, deterministic=not train)(x))


class Recurrent(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        del train
        return linen.Dense(32)(linen.RNN(linen.LSTMCell(12))(linen.Embed(32, 8)(x)))


SMALL_MODELS = {
    "perceptron": lambda: adapters.linen(mlp.MLP(num_classes=10, width=16), losses.classification, images(0)),
    "statistics": lambda: adapters.linen(Statistics(), losses.classification, images(0)),
    "recurrent": lambda: adapters.linen(Recurrent(), losses.next_token, tokens(0), inputs="tokens"),
    "gpt": lambda: MODELS["gpt with dropout"][0],
}
SMALL_OPTIMIZERS = {
    "adamw": OPTIMIZERS["adamw"],
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), OPTIMIZERS["momentum"]),
}


def test_one_program_for_a_small_step_has_the_bits_of_a_call_for_each_shard(monkeypatch):
    in_one = [small_train(small_canonical_step.__wrapped__(count, 8), count) for count in (1, 2)]
    monkeypatch.setattr(adding, "SMALL_SIZE", 0)
    in_calls = small_train(small_canonical_step.__wrapped__(2, 8), 2)
    assert {fingerprint(found) for found in in_one} == {fingerprint(in_calls)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_MODELS)
@pytest.mark.parametrize(("optimizer", "num_devices"), [("adamw", 2), ("adamw", 8), ("clipped", 3)])
def test_small_models_have_the_bits_of_a_call_for_each_shard(name, optimizer, num_devices, monkeypatch):
    functions = SMALL_MODELS[name]()
    make_batch = tokens if name in ("recurrent", "gpt") else images
    args = functions, [make_batch(seed) for seed in range(2)], SMALL_OPTIMIZERS[optimizer]
    in_one = fingerprint(train(*args, num_devices))
    monkeypatch.setattr(adding, "SMALL_SIZE", 0)
    assert in_one == fingerprint(train(*args, 1))


@pytest.mark.slow
def test_a_loop_that_waits_for_nothing_does_not_stop_on_as_many_devices_as_threads():
    mesh, step = make_mesh(), small_canonical_step(8, 8)
    state, batch = new_state(OPTIMIZERS["adamw"], mesh), place(numpy_batch(), mesh, "data")
    for _ in range(3000):
        state, _ = step(state, batch)
    assert int(state.step) == 3000
