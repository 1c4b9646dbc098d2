"""Every optimizer of optax, on shards: equal to one process, or refused by name."""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxdist import optimizers
from jaxdist.paramserver.run import optimizer_kind, shard_optimizer, whole_optimizer
from jaxdist.paramserver.run.sharding import make_sharding

SHAPES = ((4, 3), (3,), ())
BLOCK_BYTES = 24
UNDER_WARMUP = " under warm-up"
WARMUP = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 2000, 10_000)


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def kernels(params):
    """Return which leaves are kernels, by the text of their paths."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)


def last_is_kernel(params):
    """Return the same, by the last key, which a parameter server does not give."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def labels(params):
    return jax.tree.map(lambda is_kernel: "kernel" if is_kernel else "other", kernels(params))


def clipped(*after, norm=1.0):
    return optax.chain(optax.clip_by_global_norm(norm), *after)


def accumulated(inner):
    return optax.MultiSteps(inner, 2).gradient_transformation()


def aliases():
    """Return what optax and optax.contrib make from a learning rate and nothing else, constant and under a warm-up."""
    found = {}
    for module in (optax, optax.contrib):
        for name, make in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or next(iter(inspect.signature(make).parameters), None) != "learning_rate":
                continue
            for label, rate in (("", 0.01), (UNDER_WARMUP, WARMUP)):
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        made = make(rate)
                except (TypeError, ValueError):
                    continue  # it needs more than a learning rate, or no schedule
                if isinstance(made, optax.GradientTransformation):
                    found[name + label] = made
    return found


ALIASES = aliases()
GROUPS = (
    optimizers.Group(pattern="kernel", learning_rate=0.25, decay=False),
    optimizers.Group(pattern="scale", frozen=True),
)
ELEMENTWISE = {
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "clipped by value": optax.chain(optax.clip(1.0), optax.adam(1e-3)),
    "masked decay": optax.adamw(1e-2, weight_decay=0.1, mask=matrices),
    "masked": optax.masked(optax.adam(1e-2), matrices),
    "masked by path": optax.masked(optax.adam(1e-2), kernels),
    "decay by path": optax.adamw(1e-2, weight_decay=0.5, mask=kernels),
    "labels by path": optax.multi_transform({"kernel": optax.adam(1e-2), "other": optax.sgd(0.1)}, labels),
    "our decay": optimizers.build(
        optimizers.Optimizer(name="adamw", learning_rate=1e-2, weight_decay=0.5), global_batch_size=8
    ),
    "our rates by path": optimizers.build(
        optimizers.Optimizer(name="adamw", learning_rate=1e-2),
        global_batch_size=8,
        rate_factors=lambda path: 0.25 if "kernel" in path else 1.0,
    ),
    "our groups": optimizers.build(
        optimizers.Optimizer(name="adamw", learning_rate=1e-2, weight_decay=0.5, groups=GROUPS),
        global_batch_size=8,
        of_some_params=True,
    ),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=WARMUP),
    "accumulated adam": accumulated(optax.adam(1e-2)),
    "averaged": optax.chain(optax.adam(1e-2), optimizers.ema(0.99)),
}
NORM = {
    "clipped adamw in a warm-up": clipped(optax.adamw(WARMUP)),
    "clipped sgd": clipped(optax.sgd(0.1), norm=0.1),
    "clipped accumulation": clipped(accumulated(optax.adam(1e-2))),
    "clipped, learning rate 0": clipped(optax.adamw(lambda count: jnp.where(count < 5, 0.0, 1e-2))),
}
LEAFWISE = {
    "lamb in a warm-up": optax.lamb(WARMUP),
    "lars": optax.lars(1e-2),
    "factored": optax.adafactor(1e-3, min_dim_size_to_factor=2),
    "our lamb with decay": optimizers.build(
        optimizers.Optimizer(name="lamb", learning_rate=1e-2, weight_decay=0.5), global_batch_size=8
    ),
    "adaptive clipping": optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
    "clipped by block": optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(0.1)),
    "accumulated lamb": accumulated(optax.lamb(1e-2)),
    "lamb, learning rate 0": optax.lamb(lambda count: jnp.where(count < 5, 0.0, 1e-2)),
}
LEAFWISE_NORM = {"clipped lamb": clipped(optax.lamb(1e-2))}
REFUSED = {
    "accumulated clipping": accumulated(clipped(optax.adam(1e-2))),
    "clipped after scaling": optax.chain(optax.scale_by_adam(), optax.clip_by_global_norm(1.0)),
    "clipped decay": optax.chain(optax.add_decayed_weights(0.1), optax.clip_by_global_norm(1.0)),
    "prodigy in a warm-up": optax.contrib.prodigy(WARMUP),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(0.1)),
    "skipped if not finite": optax.apply_if_finite(optax.sgd(0.1), 5),
    "masked by keys": optax.masked(optax.adam(0.1), last_is_kernel),
    "decay by keys": optax.adamw(1e-2, weight_decay=0.5, mask=last_is_kernel),
    "clipped, some frozen": optimizers.build(
        optimizers.Optimizer(name="sgd", learning_rate=0.1, clip_norm=1.0, groups=GROUPS),
        global_batch_size=8,
        of_some_params=True,
    ),
    "named leaves": optax.masked(optax.sgd(0.1), {"kernel": True, "bias": False}),
}
GIVEN = {**ELEMENTWISE, **NORM, **LEAFWISE, **LEAFWISE_NORM, **REFUSED}
LEAVES = [jax.ShapeDtypeStruct(shape, np.float32) for shape in SHAPES]
NAMES = ("in/bias", "in/kernel", "scale")


def tree_of(leaves):
    """Return the params as a user has them. A bias has two dims, so that its name and its rank say different things."""
    bias, kernel, scale = leaves
    return {"in": {"bias": bias, "kernel": kernel}, "scale": scale}


def choose(optimizer, servers):
    def shards_of(whole_leaves):
        sharding = make_sharding(LEAVES, num_servers=servers, block_bytes=BLOCK_BYTES, whole_leaves=whole_leaves)
        return [[(block.leaf, sharding.shape(block)) for block in blocks] for blocks in sharding.shards]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what optax deprecates
        return optimizer_kind.choose_kind(optimizer, tree_of(LEAVES), shards_of)


@functools.cache
def gradients():
    """Return params, and gradients that are small at first and then large, so that clipping bites unevenly."""
    rng = np.random.default_rng(0)
    params = tuple(rng.normal(size=shape).astype(np.float32) for shape in SHAPES)
    sizes = [0.01, 30.0, 0.5]
    return params, [tuple(rng.normal(size=s).astype(np.float32) * size for s in SHAPES) for size in sizes]


def one_process(optimizer):
    params, *steps = [jax.tree.map(jnp.asarray, tree_of(leaves)) for leaves in [gradients()[0], *gradients()[1]]]
    state = optimizer.init(params)
    for grads in steps:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.leaves(params), jax.tree.leaves(state)


def on_servers(optimizer, kind, servers):
    """Return the params, and the optimizer's state after it was cut for the servers and joined again."""
    whole = optimizer_kind.needs_whole_leaves(kind)
    sharding = make_sharding(LEAVES, num_servers=servers, block_bytes=BLOCK_BYTES, whole_leaves=whole)
    leaves, steps = gradients()
    shards = []
    cut = whole_optimizer.OptimizerSharding(optimizer, sharding, NAMES, optimizer_kind.needs_norm(kind))
    for blocks, params in zip(sharding.shards, sharding.split(leaves)):
        shapes = [sharding.shape(block) for block in blocks]
        names = [NAMES[block.leaf] for block in blocks]
        shards.append((shard_optimizer.OptaxUpdater(optimizer, kind=kind, shapes=shapes, names=names), params))
    states = [updater.init(params) for updater, params in shards]
    params = [params for _, params in shards]
    for step, grads in enumerate(steps):
        norm_squared = sum(float(np.vdot(grad, grad)) for grad in grads)
        for number, blocks in enumerate(sharding.split(grads)):
            params[number], states[number] = shards[number][0].update(
                params[number], states[number], blocks, step=step, scale=1.0, norm_squared=norm_squared
            )
    return sharding.join(params), cut.join([tuple(state) for state in cut.split(cut.join(states))])


def chosen(name, servers):
    try:
        return choose({**ALIASES, **GIVEN}[name], servers)
    except ValueError as error:
        if "This optimizer cannot run on" not in str(error):
            raise
        return None


@pytest.mark.parametrize("name", [name for name in [*ALIASES, *GIVEN] if not name.endswith(UNDER_WARMUP)])
def test_an_optimizer_equals_one_process_or_is_refused(name):
    kind = chosen(name, 3)
    if name + UNDER_WARMUP in ALIASES:
        assert chosen(name + UNDER_WARMUP, 3) in (kind, None)  # some take no schedule
    if kind is None:
        return
    optimizer = {**ALIASES, **GIVEN}[name]
    with jax.disable_jit():  # Compiling each optimizer for each shard would be all the cost.
        wanted, wanted_state = one_process(optimizer)
        params, state = on_servers(optimizer, kind, 3)
    for got, want in zip([*params, *state], [*wanted, *wanted_state], strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("elementwise", [*ELEMENTWISE, "sgd", "adam", "adamw", "lion", "rmsprop", "adagrad under warm-up"]),
        ("global_norm", NORM),
        ("leafwise", [*LEAFWISE, "lamb", "lars", "adafactor"]),
        ("leafwise_global_norm", LEAFWISE_NORM),
    ],
)
def test_what_runs_how(kind, names):
    assert {name: choose({**ALIASES, **GIVEN}[name], 2) for name in names} == dict.fromkeys(names, kind)


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_leaves_is_refused_by_what_it_does(name):
    with pytest.raises(ValueError, match=r"depends on other leaves|differs on a shard|as a list|random key"):
        choose(REFUSED[name], 2)


def test_noise_is_refused_on_one_server_too():
    """Whose blocks are the whole, but whose state could not be saved."""
    with pytest.raises(ValueError, match="its state holds a random key"):
        choose(optax.noisy_sgd(0.1, key=0), 1)


def test_an_optimizer_that_looks_at_a_leaf_s_size_is_not_elementwise():
    """Its program is the same, but for a number that is another on a block."""

    def update(grads, state, params=None):
        return jax.tree.map(lambda grad: grad / grad.size, grads), state

    sized = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    assert choose(sized, 2) == "leafwise"


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adam", "adamw", "lion"])
def test_every_optimizer_of_our_own_runs(name, clip_norm):
    warm = optimizers.Schedule(warmup=2000)
    described = optimizers.Optimizer(name=name, learning_rate=3e-4, clip_norm=clip_norm, schedule=warm, ema_decay=0.9)
    kind = choose(optimizers.build(described, global_batch_size=8), 3)
    assert kind == ("elementwise" if clip_norm is None else "global_norm")
