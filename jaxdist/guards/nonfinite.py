"""The explanation of a loss or gradient that is not finite: it names the leaf, and the rows of the batch."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.spmd import dependence
from jaxdist.spmd.layout import path_name
from jaxdist.spmd.metrics import MASK, Batch, Mean
from jaxdist.spmd.state import TrainState, WithInputs
from jaxdist.spmd.step import update_of

PyTree: TypeAlias = Any

_MAX_SHOWN = 16

OPTIMIZER_ADVICE = (
    "Correct the optimizer or its schedule, which is called with the number of finished steps: a division by 0, a "
    "logarithm or root of a negative number, an epsilon of 0, or a rate that is negative or far too large."
)


@dataclasses.dataclass(frozen=True)
class NonFiniteReport:
    """Why a step's loss or gradient was not finite.

    Attributes:
      step: the step it happened in.
      loss: of the whole batch.
      leaf: the first leaf of the params, in tree order, whose gradient is not finite; None if all gradients are.
      positions: rows of the global batch whose own loss or gradient is not finite.
      fields: field of the batch -> rows of true examples in which it is not finite.
      integers: field with one integer a row, for example a label -> its values in `positions`.
      params: leaves of the params that are not finite themselves.
      of_all_rows: whether `positions` are all rows that count.
    """

    step: int
    loss: float
    leaf: str | None
    positions: tuple[int, ...]
    fields: Mapping[str, tuple[int, ...]]
    integers: Mapping[str, tuple[int, ...]]
    params: tuple[str, ...]
    of_all_rows: bool = False

    @property
    def found(self) -> bool:
        """Whether anything that is not finite was found."""
        return bool(self.leaf or self.positions or self.params or not np.isfinite(self.loss))

    def __str__(self) -> str:
        if self.params and self.of_all_rows:
            return "\n".join(self._of_params())
        lines = self._fault() if self.found else self._no_fault()
        for field, rows in self.fields.items():
            lines.append(f"The batch's {field!r} holds values that are not finite in rows {_show(rows)}.")
        if self.params:
            lines.append(f"Already not finite before the step: {_show(self.params)}.")
        return "\n".join(lines)

    def _of_params(self) -> list[str]:
        """Return what is said where no row can be to blame: with such params, each has a loss that is not finite."""
        lines = [f"Step {self.step}: the loss is {self.loss:g}."]
        lines.append(
            f"Already not finite before the step: {_show(self.params)}. So the rows of its batch tell nothing."
        )
        if self.step > 1:
            lines.append(
                f"The loss and the gradients of step {self.step - 1} were finite, so it was the update of the "
                f"optimizer. {OPTIMIZER_ADVICE}"
            )
        return lines

    def _no_fault(self) -> list[str]:
        return [
            f"Step {self.step} reported a value that is not finite, and computing it again gives finite ones "
            f"(loss {self.loss:g}). It depends on the random key (dropout), on the order of the additions, "
            "or on a device that computes wrongly."
        ]

    def _fault(self) -> list[str]:
        lines = [f"Step {self.step}: the loss is {self.loss:g}."]
        lines += [f"First gradient that is not finite: {self.leaf}."] if self.leaf else ["All gradients are finite."]
        if self.positions:
            lines.append(f"Rows of the batch whose own loss or gradient is not finite: {_show(self.positions)}.")
        else:
            lines.append("No row has a loss or gradient that is not finite by itself: the rows overflow together.")
        for field, values in self.integers.items():
            lines.append(f"Their {field!r}: {_show(values)}.")
        return lines


def _show(found: tuple[int, ...] | tuple[str, ...]) -> str:
    more = f" and {len(found) - _MAX_SHOWN} more" if len(found) > _MAX_SHOWN else ""
    return ", ".join(map(str, found[:_MAX_SHOWN])) + more


def leaves_with_nan(params: PyTree) -> tuple[str, ...]:
    """Return the paths of the leaves of params with a NaN; every process must call it, and waits for them."""
    named = [
        (path_name(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    found = jax.device_get([_local(each) for each in _have_nan([leaf for _, leaf in named])])
    return tuple(f"params/{name}".rstrip("/") for (name, _), bad in zip(named, found, strict=True) if bad)


@jax.jit
def _have_nan(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isnan(leaf).any() for leaf in leaves]


def explain_params(names: tuple[str, ...], *, step: int) -> str:
    """Return why a run ends whose params are no numbers after a step with a finite loss and finite gradients."""
    return (
        f"Not finite after step {step}: {_show(names)}. The loss and the gradients of that step were finite, so it was "
        f"the update of the optimizer. {OPTIMIZER_ADVICE}"
    )


def explain_factors(
    optimizer: optax.GradientTransformation, state: TrainState, *, step: int, learning_rate: float | None
) -> str:
    """Return why a step was not made whose optimizer multiplies its updates by a number that is not finite.

    Every process must call it.

    Args:
      optimizer: that of the step.
      state: the state before the step.
      step: its number.
      learning_rate: the rate of the step, None where it is not known.
    """

    def values(step: jax.Array, params: PyTree, opt_state: PyTree) -> list[jax.Array]:
        inputs = jnp.asarray(optimizer.inputs) if isinstance(optimizer, WithInputs) else None
        update = update_of(optimizer, step, inputs, jnp.float32(0))  # what depends on the loss is no factor
        return dependence.factors(update, params, opt_state, params)

    found = [float(_local(each)) for each in jax.jit(values)(state.step, state.params, state.opt_state)]
    shown = ", ".join(f"{each:g}" for each in found if not np.isfinite(each))
    rate = "" if learning_rate is None else f" The learning rate of step {step} is {learning_rate:g}."
    return (
        f"Step {step}: the loss and all gradients are finite, but the optimizer would multiply its updates by {shown}."
        f"{rate} No update was made: the params are those of step {step - 1}. {OPTIMIZER_ADVICE}"
    )


def explain_nonfinite(
    loss_fn: Callable[..., Any], state: TrainState, batch: Batch, *, step: int | None = None, first_row: int = 0
) -> NonFiniteReport:
    """Return why the step from `state` with `batch` had a loss or gradient that is not finite.

    Computes the gradient of the whole batch and that of each row by itself, the rows on the devices that hold them, one
    after the other: slow, meant for the end of a run. Rows whose mask is 0 are left out. Every process must call it.

    Args:
      loss_fn: `loss_fn(params, batch, key)`, or with model_state if the state has one. Its key is not the one a
        device would have folded, so with dropout other values are dropped than in the step.
      state: the state before the step.
      batch: the global batch of the step.
      step: its number; by default the one after `state.step`.
      first_row: the row of the global batch at which `batch` starts, if it is a part of it.
    """
    shards = _RowShards(batch)
    loss, leaves = jax.jit(functools.partial(_finite_gradients, loss_fn), out_shardings=shards.replicated)(state, batch)
    rows = shards.each_row(functools.partial(_rows_are_finite, loss_fn))(state, batch)
    params = jax.jit(_finite_leaves, out_shardings=shards.replicated)(state.params)
    integers = jax.jit(_integers, out_shardings=shards.replicated)(batch)
    found = jax.tree.map(_local, (loss, leaves, rows, params, integers))
    loss, leaves, rows, params, integers = jax.device_get(found)
    names = [f"params/{path_name(path)}".rstrip("/") for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    bad_leaves = [name for name, finite in zip(names, leaves, strict=True) if not finite]
    used = rows[MASK]
    bad_rows = {name: tuple(np.flatnonzero(used & ~finite).tolist()) for name, finite in rows.items() if name != MASK}
    own = bad_rows.pop(_OWN)
    return NonFiniteReport(
        step=int(_local(state.step)) + 1 if step is None else step,
        loss=float(loss),
        leaf=bad_leaves[0] if bad_leaves else None,
        positions=_from(first_row, own),
        fields={name: _from(first_row, rows) for name, rows in bad_rows.items() if rows},
        integers={name: tuple(values[list(own)].tolist()) for name, values in integers.items() if own},
        params=tuple(name for name, finite in zip(names, params, strict=True) if not finite),
        of_all_rows=len(own) == int(used.sum()),
    )


_OWN = ""  # The key of a row's own loss and gradient, among those of the batch's fields.


def _local(array: jax.Array) -> jax.Array:
    return array.addressable_data(0)


def _integers(batch: Batch) -> Batch:
    """Return the fields that hold one integer a row."""
    return {name: each for name, each in batch.items() if each.ndim == 1 and jnp.issubdtype(each.dtype, jnp.integer)}


def _from(first: int, rows: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(first + row for row in rows)


class _RowShards:
    """How the rows of a batch are placed on devices."""

    def __init__(self, batch: Batch):
        sharding = next(iter(batch.values())).sharding
        self.mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        self.spec = PartitionSpec(*sharding.spec[:1]) if isinstance(sharding, NamedSharding) else PartitionSpec()
        self.replicated = sharding if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def each_row(self, rows_fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return `rows_fn(state, batch)` as a program in which every device works on its own rows."""
        if self.mesh is None:
            return jax.jit(rows_fn)
        specs = (PartitionSpec(), self.spec)
        mapped = jax.shard_map(rows_fn, mesh=self.mesh, in_specs=specs, out_specs=self.spec, check_vma=False)
        return jax.jit(mapped, out_shardings=self.replicated)


def _rows_are_finite(loss_fn: Callable[..., Any], state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    """Return bool [rows]: whether the row counts, whether it has a finite loss and gradient, and so for its fields."""

    def row_is_finite(row: Batch) -> jax.Array:
        loss, leaves = _finite_gradients(loss_fn, state, jax.tree.map(lambda value: value[None], row))
        return jnp.isfinite(loss) & leaves.all()

    num_rows = next(iter(batch.values())).shape[0]
    flags = {
        name: jnp.isfinite(field).reshape(num_rows, -1).all(axis=1)
        for name, field in batch.items()
        if jnp.issubdtype(field.dtype, jnp.inexact)
    }
    flags[_OWN] = jax.lax.map(row_is_finite, dict(batch))
    flags[MASK] = batch[MASK] > 0 if MASK in batch else jnp.ones(num_rows, bool)
    return flags


def _finite_gradients(loss_fn: Callable[..., Any], state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return the loss (float32, scalar), and bool [leaves]: whether each leaf's gradient is finite."""
    key = jax.random.fold_in(state.key, state.step)
    extra = () if state.model_state is None else (state.model_state,)

    def scalar_loss(params: PyTree) -> jax.Array:
        loss = loss_fn(params, batch, key, *extra)[0]
        return (loss.value if isinstance(loss, Mean) else loss).astype(jnp.float32)

    loss, grads = jax.value_and_grad(scalar_loss)(state.params)
    return loss, _finite_leaves(grads)


def _finite_leaves(tree: PyTree) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])
