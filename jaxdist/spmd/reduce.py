"""From local gradients to the global mean. No other module computes it.

Every device sums over its own examples: gradients of the *summed* loss, and with each sum its count.
Sums add up exactly over microbatches, devices and hosts whatever the number of true examples in each; one division at
the end makes the mean. Two reductions add up the devices' sums: `mean_over_axis` (the hardware's all-reduce: fast,
in an order of additions of its own) and `tree_sum_over_axis` (a fixed binary tree, the same bits on any number of
devices).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxdist.spmd import metrics as metrics_lib
from jaxdist.spmd.layout import path_name, spec_axes
from jaxdist.spmd.metrics import Batch, Mean

PyTree: TypeAlias = Any
LossFn: TypeAlias = Callable[..., Any]
"""`loss_fn(params, batch, key) -> (loss, metrics)`; with model_state: `loss_fn(params, batch, key, model_state) ->
(loss, metrics, model_state)`. loss and each metric: a scalar (mean over the batch's true examples) or a Mean."""

Flatten: TypeAlias = Callable[[PyTree], tuple[list[jax.Array], Any]]
"""`flatten(tree) -> (arrays, form)`, where `form.unflatten(arrays)` gives a tree like it: `jax.tree.flatten`, or
`packed` for leaves that a device has whole."""

GatherFn: TypeAlias = Callable[[PyTree, jax.Array], PyTree]
"""`gather_fn(shards, has_examples) -> params`: the whole params, gathered from the devices' shards; see `gather`."""

_GATHERED = "gathered_param"

PACKED_MAX_SIZE = 1 << 14
"""Elements up to which leaves share one all-reduce; copying them costs less than one more collective."""

HALVING_MIN_SIZE = 1 << 15
"""Elements from which recursive halving beats doubling: below it, latency matters more than bandwidth."""


class Sums(NamedTuple):
    """Sums over some examples, every leaf at least float32. The Sums of disjoint examples add up leaf by leaf."""

    grads: PyTree
    loss: Mean
    metrics: dict[str, Mean]
    model_state: PyTree
    num_examples: jax.Array


class Averages(NamedTuple):
    """What a step needs of the whole batch: mean gradients, loss and metrics (float32 scalars), new model_state.

    `count` is what the loss was divided by; where it is 0, nothing in the batch counted and the means are NaN.
    `grad_norm` is the global norm of the mean gradients, before any clipping.
    """

    grads: PyTree
    loss: jax.Array
    metrics: dict[str, jax.Array]
    model_state: PyTree
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, which has no use here
    grad_norm: jax.Array


def evaluate_loss(
    loss_fn: LossFn, params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array
) -> tuple[Mean, dict[str, Mean], PyTree]:
    """Call `loss_fn` in the form that its model needs, and return (loss, metrics, model_state) with Means for averages.

    Raises:
      ValueError: it does not return what this form needs, or a plain scalar that counts padding rows.
    """
    batch = metrics_lib.without_masked_rows(batch)
    args = (params, batch, key) if model_state is None else (params, batch, key, model_state)
    results = loss_fn(*metrics_lib.unshared(args))
    expected = "(loss, metrics)" if model_state is None else "(loss, metrics, model_state)"
    whole = isinstance(results, tuple) and not isinstance(results, Mean)  # a Mean alone is a tuple of two, too
    if not whole or len(results) != len(args) - 1:
        got = f"{len(results)} values" if whole else type(results).__name__
        raise ValueError(
            f"loss_fn must return {expected} for a model {'without' if model_state is None else 'with'} model_state; "
            f"it returned {got}. What init_fn returns decides which of the two a model is: see jaxdist.InitialState."
        )
    loss, metrics, *new_state = results
    metrics_lib.check_mapping(metrics, "loss_fn")
    metrics_lib.check_averages({"loss": loss, **metrics}, loss_fn, args)
    means = {name: metrics_lib.as_mean(value, batch) for name, value in metrics.items()}
    return metrics_lib.as_mean(loss, batch), means, new_state[0] if new_state else None


def local_sums(
    loss_fn: LossFn,
    params: PyTree,
    model_state: PyTree,
    batch: Batch,
    key: jax.Array,
    loss_scale: jax.Array | None = None,
    gather_fn: GatherFn | None = None,
    flatten: Flatten = jax.tree.flatten,
) -> Sums:
    """Return the Sums over the true examples of `batch`: gradients, loss, metrics, weighted model_state.

    A leaf of model_state that the model hands back as it was is left out, an array of no elements: see `average`.
    A batch of padding only contributes exact zeros, even where its loss is 0/0. `loss_scale` multiplies the loss
    before differentiation and divides the gradients after it (float16). With a `gather_fn`, `params` are this device's
    shards and so are the gradients, which are then sums over all devices.
    """
    scale = jnp.float32(1.0) if loss_scale is None else loss_scale
    num_examples = metrics_lib.num_examples(batch)

    def evaluate(params: PyTree) -> tuple[Mean, dict[str, Mean], PyTree]:
        whole = params if gather_fn is None else gather_fn(params, num_examples > 0)
        return evaluate_loss(loss_fn, whole, model_state, batch, key)

    if gather_fn is not None:
        # Without it, every gathered param would stay in memory until the backward pass has used it.
        evaluate = jax.checkpoint(evaluate, policy=_is_kept_for_backward)

    check_params(params)

    def summed_loss(params: PyTree) -> tuple[jax.Array, Any]:
        loss, metrics, new_model_state = evaluate(params)
        return loss.total * scale, (loss, metrics, changed(new_model_state, model_state))

    grads, (loss, metrics, new_model_state) = jax.grad(summed_loss, has_aux=True)(params)
    grads = jax.tree.map(_descent_direction, grads)
    grads = jax.tree.map(lambda grad: grad / scale, grads) if loss_scale is not None else grads
    check_model_state(new_model_state)
    weighted = jax.tree.map(lambda leaf: addable(leaf) * num_examples, new_model_state)
    sums = Sums(grads, loss, metrics, weighted, num_examples)
    arrays, form = flatten(sums)
    kept: Sums = form.unflatten([jnp.where(num_examples > 0, array, jnp.zeros_like(array)) for array in arrays])
    # The gradients of gathered params already include other devices' examples; `gather` kept the padding out of them.
    return kept if gather_fn is None else kept._replace(grads=grads)


_UNCHANGED = (0,)


def changed(new: PyTree, old: PyTree) -> PyTree:
    """Return the new tree without the leaves that are those of the old one, the very objects: arrays of no elements."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (new, old)]
    if structures[0] != structures[1]:
        return new  # which is told where the state is created
    return jax.tree.map(
        lambda after, before: jnp.zeros(_UNCHANGED, after.dtype) if after is before else after, new, old
    )


def with_unchanged(sums: Sums, model_state: PyTree) -> PyTree:
    """Return the weighted model_state of `sums` with the leaves that were left out, of their value in `model_state`."""

    def whole(old: jax.Array, leaf: jax.Array) -> jax.Array:
        return addable(old) * sums.num_examples if is_unchanged(old, leaf) else leaf

    return jax.tree.map(whole, model_state, sums.model_state)


def is_unchanged(old: jax.Array, leaf: jax.Array) -> bool:
    """Return whether a leaf of the sums of model_state was left out."""
    return leaf.shape in (_UNCHANGED, (2, *_UNCHANGED)) and old.shape != _UNCHANGED


def accumulate_sums(
    loss_fn: LossFn,
    params: PyTree,
    model_state: PyTree,
    batch: Batch,
    key: jax.Array,
    *,
    num_microbatches: int,
    first_index: jax.Array | int,
    loss_scale: jax.Array | None = None,
    gather_fn: GatherFn | None = None,
    flatten: Flatten = jax.tree.flatten,
) -> Sums:
    """Return the Sums of `batch`, computed one microbatch after another (gradient accumulation).

    The leading dim of this device's examples is a multiple of `num_microbatches`. Each microbatch starts from the same
    `model_state`, of which the new values are averaged by example count, and folds its own index, counted over the
    global batch from `first_index` on, into the step's `key`. For the rest see `local_sums`.
    """

    def sums_of(index: jax.Array | int, microbatch: Batch) -> Sums:
        own_key = jax.random.fold_in(key, first_index + index)
        return local_sums(loss_fn, params, model_state, microbatch, own_key, loss_scale, gather_fn, flatten)

    if num_microbatches == 1:
        return sums_of(0, batch)
    microbatches = jax.tree.map(lambda leaf: leaf.reshape(num_microbatches, -1, *leaf.shape[1:]), batch)
    indices = jnp.arange(num_microbatches)
    shapes = jax.eval_shape(sums_of, indices[0], jax.tree.map(lambda leaf: leaf[0], microbatches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total: Sums, part: tuple[jax.Array, Batch]) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, sums_of(*part)), None

    return lax.scan(add, zeros, (indices, microbatches))[0]


def mean_over_axis(sums: Sums, axis: str | tuple[str, ...]) -> Sums:
    """Average `sums` over a mesh axis by `lax.pmean`, totals and counts alike: their quotients are the global means.

    Small leaves share one collective: their cost is its latency, not their bytes (tensor fusion of Horovod; Sergeev and
    Del Balso, 2018).
    """
    if lax.axis_size(axis) == 1:
        return sums
    arrays, form = packed(sums)
    means: Sums = form.unflatten(lax.pmean(arrays, axis))
    return means


class JoinedLeaves(NamedTuple):
    """How the leaves of a tree are joined: the places of those that share an array, and the shapes of all."""

    structure: Any
    joined: list[list[int]]
    shapes: list[tuple[int, ...]]

    def unflatten(self, arrays: Sequence[jax.Array]) -> PyTree:
        """Return the tree of the joined arrays."""
        leaves: dict[int, jax.Array] = {}
        for array, places in zip(arrays, self.joined, strict=True):
            ends = list(itertools.accumulate(math.prod(self.shapes[place]) for place in places))
            pieces = jnp.split(array, ends[:-1]) if len(places) > 1 else [array]
            leaves |= {place: piece.reshape(self.shapes[place]) for place, piece in zip(places, pieces, strict=True)}
        return jax.tree.unflatten(self.structure, [leaves[place] for place in range(len(leaves))])


def packed(tree: PyTree) -> tuple[list[jax.Array], JoinedLeaves]:
    """Return the leaves as few arrays, the small ones of a dtype joined, and how they are joined.

    An operation on all elements is then one, where a small model's step would have as many as leaves, each too short to
    be worth its own start. XLA joins what was divided at no cost.
    """
    leaves, structure = jax.tree.flatten(tree)
    joined: dict[Any, list[int]] = {}
    for place, leaf in enumerate(leaves):
        joined.setdefault(leaf.dtype if leaf.size <= PACKED_MAX_SIZE else place, []).append(place)
    arrays = [
        jnp.concatenate([leaves[place].reshape(-1) for place in places]) if len(places) > 1 else leaves[places[0]]
        for places in joined.values()
    ]
    return arrays, JoinedLeaves(structure, list(joined.values()), [leaf.shape for leaf in leaves])


def gather(leaf: jax.Array, spec: PartitionSpec, has_examples: jax.Array) -> jax.Array:
    """Return, inside shard_map, the whole leaf; `spec` says how it is sharded over the manual axes.

    Its derivative is a reduce-scatter, to which a device without true examples adds exact zeros.
    """
    for dim, axes in enumerate(spec):
        leaf = leaf if axes is None else lax.all_gather(leaf, axes, axis=dim, tiled=True)
    return checkpoint_name(_zero_cotangent_unless(leaf, has_examples), _GATHERED)


def _is_kept_for_backward(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Return whether a value is kept: all but the results of `gather` and of its all-gather, and complex numbers.

    JAX rounds what it keeps to its own precision, by an operation that refuses complex numbers.
    """
    dtypes = [*(each.dtype for each in operands if hasattr(each, "dtype")), params.get("new_dtype", jnp.float32)]
    is_complex = primitive.name in _MAKE_COMPLEX or any(jnp.issubdtype(each, jnp.complexfloating) for each in dtypes)
    return primitive.name != lax.all_gather_p.name and params.get("name") != _GATHERED and not is_complex


_MAKE_COMPLEX = ("complex", "conj", "fft")
"""Operations whose result may be complex where their operands are real."""


@jax.custom_vjp
def _zero_cotangent_unless(leaf: jax.Array, condition: jax.Array) -> jax.Array:
    del condition
    return leaf


# The gradient of a loss that is 0/0 is NaN, and would be added to other devices' before `local_sums` can drop it.
_zero_cotangent_unless.defvjp(
    lambda leaf, condition: (leaf, condition),
    lambda condition, cotangent: (jnp.where(condition, cotangent, jnp.zeros_like(cotangent)), None),
)


def sum_over_axes(
    grad: jax.Array, axes: tuple[str, ...], *, param_spec: PartitionSpec, grad_spec: PartitionSpec
) -> jax.Array:
    """Return, inside shard_map, the shard that `grad_spec` gives this device of a gradient's sum over `axes`.

    Over the axes in `param_spec` it is summed already, because the derivative of `gather` is a reduce-scatter. Over the
    axes only in `grad_spec` it is reduced and scattered here, over all others reduced.
    """
    left = [axis for axis in axes if axis not in spec_axes(param_spec)]
    for dim, entry in enumerate(grad_spec):
        scattered = [axis for axis in spec_axes(PartitionSpec(entry)) if axis in left]
        if scattered:
            grad = lax.psum_scatter(grad, tuple(scattered), scatter_dimension=dim, tiled=True)
            left = [axis for axis in left if axis not in scattered]
    return lax.psum(grad, tuple(left)) if left else grad


def average(sums: Sums, model_state: PyTree, flatten: Flatten = jax.tree.flatten) -> Averages:
    """Return the means that `sums` stand for; `model_state` gives the dtypes of its new value.

    It also gives the leaves that the model handed back as they were. Those may be constants: a sum divided by a number
    that is no power of two has other last bits, and that of a mask of large numbers is infinite.
    """
    arrays, form = flatten(sums.grads)
    grads = form.unflatten([array / sums.loss.count for array in arrays])

    def averaged(old: jax.Array, leaf: jax.Array) -> jax.Array:
        return old if is_unchanged(old, leaf) else from_addable(leaf / sums.num_examples, old.dtype)

    new_model_state = jax.tree.map(averaged, model_state, sums.model_state)
    means = {name: mean.value for name, mean in sums.metrics.items()}
    # Of the sums and not of the means: what the optimizer computes with has no other use, and so keeps its bits.
    grad_norm = jnp.sqrt(sum_of_squares(arrays)) / sums.loss.count
    return Averages(grads, sums.loss.value, means, new_model_state, sums.loss.count, grad_norm)


def sum_of_squares(tree: PyTree) -> jax.Array:
    """Return the sum over all values of a tree of their squared magnitudes, float32."""
    return sum((_squared_norm(leaf) for leaf in jax.tree.leaves(tree)), jnp.float32(0))


def _squared_norm(leaf: jax.Array) -> jax.Array:
    # A product is vectorised, where XLA adds up squares in one long chain. It is taken over all dims at once: on the
    # global view, flattening a leaf that is sharded in another dim than the first would gather it on every device.
    dims = tuple(range(leaf.ndim))
    return lax.dot_general(jnp.conj(leaf), leaf, ((dims, dims), ((), ()))).real.astype(jnp.float32)


def tree_sum_over_axis(vector: jax.Array, axis: str | tuple[str, ...], num_devices: int) -> jax.Array:
    """Return the sum over a mesh axis of 2^k devices in a fixed tree: neighbours first, then pairs of pairs.

    The order of additions depends only on the devices' places, so it continues the tree that each device started over
    its own logical shards. Large vectors use recursive halving and an all-gather, at the cost of a ring; small ones
    recursive doubling (Thakur, Rabenseifner and Gropp 2005). Both add the same numbers in the same order.

    The vector is a float array of one dim, different on each device. The axis, or several that are one, has
    `num_devices` devices, a power of two.
    """
    if vector.size < HALVING_MIN_SIZE:
        return _recursive_doubling(vector, axis, num_devices)
    return _recursive_halving(vector, axis, num_devices)


def tree_sum(values: Sequence[jax.Array]) -> jax.Array:
    """Return the sum in a fixed tree: neighbours, then pairs of pairs; an odd one out waits for the next level."""
    while len(values) > 1:
        pairs = [first + second for first, second in zip(values[::2], values[1::2])]
        values = [*pairs, values[-1]] if len(values) % 2 else pairs
    return values[0]


def tree_sum_of_slots(vectors: jax.Array, axis: str | tuple[str, ...], slots: Sequence[int]) -> jax.Array:
    """Return, inside shard_map, the `tree_sum` of some of all devices' vectors, whichever devices hold them.

    Each device receives its slice of every vector (an all-to-all), adds the slices, and all get all sums. The bits are
    those of `tree_sum_over_axis` where both can be used: the tree depends on the number of summands alone.

    `vectors` are this device's, float, shape (vectors a device, size); `slots` are the summands in order, each a place
    among all devices' vectors. The axis may be several that are one.
    """
    num_devices, size = lax.axis_size(axis), vectors.shape[1]
    padded = jnp.pad(vectors, ((0, 0), (0, -size % num_devices)))
    slices = padded.reshape(len(vectors), num_devices, -1)
    received = lax.all_to_all(slices, axis, split_axis=1, concat_axis=0, tiled=True)[:, 0]
    return lax.all_gather(tree_sum([received[slot] for slot in slots]), axis, tiled=True)[:size]


def _recursive_doubling(vector: jax.Array, axis: str | tuple[str, ...], num_devices: int) -> jax.Array:
    for pairs in doubling(num_devices):
        vector = vector + lax.ppermute(vector, axis, pairs)
    return vector


def _recursive_halving(vector: jax.Array, axis: str | tuple[str, ...], num_devices: int) -> jax.Array:
    size = vector.size
    chunk = jnp.pad(vector, (0, -size % num_devices))
    index = lax.axis_index(axis)
    distance = 1
    while distance < num_devices:
        halves = chunk.reshape(2, -1)
        side = (index // distance) % 2
        received = lax.ppermute(halves[1 - side], axis, _swap_pairs(num_devices, distance))
        chunk = halves[side] + received
        distance *= 2
    # Device i ends with the chunk whose number has i's bits reversed: its first exchange chose the largest half.
    gathered = lax.all_gather(chunk, axis)
    num_bits = num_devices.bit_length() - 1
    order = jnp.array([int(f"{i:0{num_bits}b}"[::-1], 2) for i in range(num_devices)])
    return gathered[order].reshape(-1)[:size]


def doubling(num_devices: int) -> list[list[tuple[int, int]]]:
    """Return the exchanges of recursive doubling among 2^k devices: in each, the pairs (source, target)."""
    return [_swap_pairs(num_devices, 1 << level) for level in range(num_devices.bit_length() - 1)]


def _swap_pairs(num_devices: int, distance: int) -> list[tuple[int, int]]:
    return [(i, i ^ distance) for i in range(num_devices)]


def _descent_direction(grad: jax.Array) -> jax.Array:
    """Return a gradient from JAX as an optimizer subtracts it: at least float32, conjugated for a complex param."""
    return jnp.conj(grad.astype(jnp.promote_types(grad.dtype, jnp.float32)))


def check_params(params: PyTree) -> None:
    """Raise ValueError where a param is of a kind that has no gradient."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"Params must be floating or complex, because a gradient is taken of each; params/{path_name(path)} is "
                f"{leaf.dtype}{list(leaf.shape)}. Keep counters and tables in model_state, or make it floating."
            )


def check_model_state(model_state: PyTree) -> None:
    """Raise ValueError where a leaf of the model's state cannot be averaged over the devices."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(model_state):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"The model's state is averaged over the devices, and a random key has no mean; "
                f"model_state/{path_name(path)} is {leaf.dtype}. Draw from the key that the loss is given (a module "
                "has make_rng or nnx.Rngs), which is another one in each step."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.dtype.itemsize > 4:
            raise ValueError(
                f"Integers of the model's state have at most 32 bits; model_state/{path_name(path)} is {leaf.dtype}. "
                "Make it int32."
            )


_HALF = 1 << 16


def addable(leaf: jax.Array) -> jax.Array:
    """Return an array in a form that can be summed over replicas, at least float32.

    Integers, such as a counter in model_state, which is the same on every replica, must stay exact, and float32 holds
    them up to 2**24: so their two halves of 16 bits are sent as floats, stacked in a new first dim.
    """
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    if leaf.dtype.itemsize > 4:
        raise ValueError(f"Integers that are added up have at most 32 bits; got {leaf.dtype}. Make it int32.")
    whole = leaf.astype(jnp.int32)
    high = jnp.floor_divide(whole, _HALF)
    return jnp.stack([high, whole - high * _HALF]).astype(jnp.float32)


def from_addable(mean: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the mean of values from `addable`, or the sum of one such value and zeros, in the array's own dtype."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return mean.astype(dtype)
    high, low = jnp.round(mean).astype(jnp.int32)
    return (high * _HALF + low).astype(dtype)
