"""The training state: what one step hands to the next, created with its final sharding on the mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.spmd import keys
from jaxdist.spmd import layout as layouts

PyTree: TypeAlias = Any
InitFn: TypeAlias = Callable[[jax.Array], Any]
"""`init_fn(key) -> params`, or `(params, model_state)` for a model that keeps statistics; see `InitialState`."""


class InitialState(NamedTuple):
    """What an `init_fn` returns to name its params and its model_state (None for a stateless model).

    An `init_fn` may return a plain pair in its place: a tuple of two is read as (params, model_state). So params that
    are themselves a pair must be returned as `InitialState((first, second))`. Every other type, a named tuple included,
    is params.
    """

    params: PyTree
    model_state: PyTree = None


def initial_state(init_fn: InitFn, key: jax.Array) -> InitialState:
    """Return what `init_fn(key)` gives, separated into params and model_state.

    Raises:
      ValueError: a plain pair whose second part is an array: more likely params than (params, model_state).
    """
    created = init_fn(key)
    if isinstance(created, InitialState):
        return created
    if type(created) is not tuple or len(created) != 2:
        return InitialState(created)
    if isinstance(created[1], jax.Array | np.ndarray):
        raise ValueError(
            "A pair from init_fn is read as (params, model_state), but the second part of this one is an array of "
            f"shape {created[1].shape}. Return jaxdist.InitialState((first, second)) if both are params, or "
            "jaxdist.InitialState(params, model_state) if the array is the model's state."
        )
    return InitialState(*created)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What one step hands to the next: arrays only, each with the sharding of its layout.

    Attributes:
      step: the number of finished steps, int32, a scalar; `~step` after one that was not finite.
      params: what is trained.
      model_state: what the model keeps besides, such as statistics; None for a model without any.
      opt_state: of the optimizer.
      key: a typed key, a scalar, the same in every step: a step folds in its number.
    """

    step: jax.Array
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    key: jax.Array


class WithInputs(optax.GradientTransformationExtraArgs):
    """An optimizer with numbers that enter the compiled step as an argument, so that other numbers need no new compile.

    Its `update` takes two more arguments, both optional: `step`, the number of finished steps, and `inputs`.
    """

    inputs: np.ndarray
    has_finite_rates: bool

    @classmethod
    def make(
        cls, optimizer: optax.GradientTransformation, inputs: np.ndarray, *, has_finite_rates: bool = False
    ) -> "WithInputs":
        """Return `optimizer` with its inputs; its rates need no look in each step if they cannot but be finite."""
        made = cls(optimizer.init, optax.with_extra_args_support(optimizer).update)
        made.inputs, made.has_finite_rates = inputs, has_finite_rates
        return made


class PlacedInputs:
    """The inputs of an optimizer on every device of a mesh, placed when they are first used; None for one without."""

    def __init__(self, optimizer: optax.GradientTransformation, mesh: Mesh):
        self._values = optimizer.inputs if isinstance(optimizer, WithInputs) else None
        self._sharding = NamedSharding(mesh, PartitionSpec())
        self._placed: jax.Array | None = None

    def placed(self) -> jax.Array | None:
        """Return the array."""
        if self._placed is None and self._values is not None:
            # device_put would compare the values of all processes by a collective, which each run compiles or loads.
            self._placed = jax.make_array_from_callback(self._values.shape, self._sharding, self._values.__getitem__)
        return self._placed

    def described(self) -> jax.ShapeDtypeStruct | None:
        """Return its description, for a mesh of devices that are not there."""
        if self._values is None:
            return None
        return jax.ShapeDtypeStruct(self._values.shape, self._values.dtype, sharding=self._sharding)


def create_state(
    init_fn: InitFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    seed: int,
    layout: layouts.Layout = layouts.replicated,
) -> TrainState:
    """Return the state before the first step, every leaf created with its final sharding.

    One jitted program makes it, so no device ever holds more than its own shards, and the train step, which sees the
    same shardings from its first call to its last, compiles once.

    Args:
      init_fn: `init_fn(key) -> params`, or `(params, model_state)`; see `InitialState`.
      optimizer: makes the opt_state of the params.
      mesh: the devices.
      seed: of the params and of the key in the state; from 0, up to 64 bits.
      layout: `layout(path, leaf) -> PartitionSpec` of each leaf; by default every device holds all of the state.

    Raises:
      ValueError: the optimizer cannot begin with these params, or a leaf cannot be sharded as the layout says.
    """
    return state_program(init_fn, optimizer, mesh=mesh, layout=layout)(keys.from_seed(seed))


def create_state_with(
    replace: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    init_fn: InitFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    seed: int,
    layout: layouts.Layout = layouts.replicated,
) -> TrainState:
    """Return the state before the first step with other params: `replace(params, model_state)` of those of the seed.

    `replace` keeps shapes, dtypes and shardings. The optimizer's state is made from what it returns.
    """
    drawn = create_state(init_fn, optax.identity(), mesh=mesh, seed=seed, layout=layout)
    shardings = _shardings(init_fn, optimizer, mesh, layout)
    return _begun_with(drawn, replace(drawn.params, drawn.model_state), optimizer, shardings)


def create_same_state(
    init_fn: InitFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    seed: int,
    layout: layouts.Layout = layouts.replicated,
    replace: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]] = lambda params, model_state: (params, model_state),
) -> TrainState:
    """Return the state before the first step with the same bits for every layout, as canonical reduction wants it.

    Random numbers of a shard need not have the bits of those of the whole, which XLA computes in another way. So each
    device makes the params whole, and keeps its shards of them. `replace` is that of `create_state_with`.
    """
    whole = create_state(init_fn, optax.identity(), mesh=mesh, seed=seed)
    shardings = _shardings(init_fn, optimizer, mesh, layout)
    shard = jax.jit(lambda tree: tree, out_shardings=(shardings.params, shardings.model_state))
    return _begun_with(whole, replace(*shard((whole.params, whole.model_state))), optimizer, shardings)


def _shardings(init_fn: InitFn, optimizer: optax.GradientTransformation, mesh: Mesh, layout: layouts.Layout) -> Any:
    abstract = abstract_state(init_fn, optimizer, mesh=mesh, layout=layout)
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _begun_with(
    drawn: TrainState, own: tuple[PyTree, PyTree], optimizer: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
    """Return a state of step and key as drawn, with params and model_state of its own, and its opt_state from these."""
    make = jax.jit(lambda params: _strongly_typed(optimizer.init(params)), out_shardings=shardings.opt_state)
    return TrainState(drawn.step, *own, make(own[0]), drawn.key)


def state_program(
    init_fn: InitFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    layout: layouts.Layout = layouts.replicated,
) -> jax.stages.Wrapped:
    """Return the jitted function of a key that `create_state` calls; `lower` shows the program."""
    make = _make_state_fn(init_fn, optimizer)
    shardings = layouts.shardings(jax.eval_shape(make, jax.random.key(0)), mesh, layout)
    return jax.jit(make, out_shardings=shardings)


def abstract_state(
    init_fn: InitFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    layout: layouts.Layout = layouts.replicated,
) -> TrainState:
    """Return the state's shapes, dtypes and shardings as ShapeDtypeStructs, without computing anything."""
    shapes = jax.eval_shape(_make_state_fn(init_fn, optimizer), jax.random.key(0))
    shardings = layouts.shardings(shapes, mesh, layout)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def _make_state_fn(init_fn: InitFn, optimizer: optax.GradientTransformation) -> Callable[[jax.Array], TrainState]:
    def make(key: jax.Array) -> TrainState:
        run = keys.run_keys(key)
        params, model_state = initial_state(init_fn, run.init)
        params, model_state = _strongly_typed((params, model_state))
        opt_state = _strongly_typed(_initialised(optimizer, params))
        return TrainState(jnp.zeros((), jnp.int32), params, model_state, opt_state, run.train)

    return make


def _initialised(optimizer: optax.GradientTransformation, params: PyTree) -> PyTree:
    try:
        return optimizer.init(params)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        names = ", ".join(sorted(map(str, params))) if isinstance(params, Mapping) else str(jax.tree.structure(params))
        said = str(error).strip().rstrip(".")
        raise ValueError(
            f"The optimizer cannot begin with these params: {said}. What selects params (optax.masked, "
            f"optax.multi_transform) takes a tree of their structure, or a function that makes one of them; theirs has "
            f"{names}."
        ) from error


def _strongly_typed(tree: PyTree) -> PyTree:
    """Return the arrays with dtypes that arithmetic keeps.

    A weak type (that of a Python number, or of `jnp.full(n, 1.0)`) becomes a strong one in the first step, for whose
    result the step would be compiled a second time.
    """

    def strong(leaf: Any) -> jax.Array:
        array = jnp.asarray(leaf)
        return array if keys.is_key(array) else jax.lax.convert_element_type(array, array.dtype)

    return jax.tree.map(strong, tree)
