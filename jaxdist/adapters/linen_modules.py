"""Linen modules as functions of arrays."""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import errors as flax_errors
from flax import linen as flax_linen

from jaxdist.adapters import first_calls, functions, module_checks
from jaxdist.adapters.flax_trees import unboxed
from jaxdist.adapters.functions import Functions, Loss, PyTree
from jaxdist.adapters.initial_shapes import InitialShapes
from jaxdist.spmd.metrics import SEGMENT_IDS, Batch
from jaxdist.spmd.precision import Precision


def linen(
    module: flax_linen.Module,
    loss: Loss,
    example_batch: Mapping[str, Any],
    *,
    inputs: str | Sequence[str] = "image",
    precision: Precision = "float32",
    is_checked: bool = False,
    initial: InitialShapes | None = None,
) -> Functions:
    """Return the functions of a Linen module.

    Every collection but `params` is model_state: a dict from the collection's name to its variables. Each random stream
    that the module draws from (`dropout` and others) has a key of its own, made of the key given to loss_fn.

    Args:
      module: called as `module(*inputs)`, with `train=` and `mask=` if it takes them.
      loss: see `Loss`; `jaxdist.losses` has the usual ones.
      example_batch: arrays or jax.ShapeDtypeStructs with the shapes of a batch; only shapes and dtypes are used.
      inputs: the batch field, or fields in order, that the module is called with.
      precision: the dtype that the module computes in; params, statistics and the loss are float32 always.
      is_checked: see `from_model`.
      initial: see `from_model`.

    Raises:
      ValueError: a field is missing; the module takes a switch of another name than `train`, or has statistics of the
        batch and takes no `mask`, or takes no `segment_ids` of packed rows; or the loss does not give values of
        examples or tokens.
    """
    called = _Called(module, module_checks.input_fields(inputs, example_batch), example_batch)
    module_checks.check_call(type(module), called.accepted, called.fields, example_batch)
    make = jax.jit(called.make, inline=True)  # traced once, where its shapes and those of the state are looked at
    row = called.row()

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        return make(key, row)

    train = " and train" if "train" in called.accepted else ""
    rule = f"A module is called with its inputs, here {', '.join(called.fields)}{train}"
    with first_calls.first_call(rule, type(module).__name__):
        shapes = (initial or InitialShapes()).of(init, type(module).__name__)
    collections = sorted(shapes[1])
    training = functools.partial(called.apply, mutable=collections, train=True)
    given = (*shapes, dict(example_batch), jax.eval_shape(jax.random.key, 0))
    # Found when the module is first called: where process 0 traces for all, the others never call it.
    streams = functools.cache(lambda: _streams_of(lambda names: functools.partial(training, names), given))

    def forward(*args: Any, train: bool) -> tuple[Any, PyTree]:
        return training(streams(), *args) if train else called.apply((), *args, mutable=(), train=False)

    forward = functions.in_precision(forward, precision)
    if not is_checked:
        streams()
        module_checks.check_begins_without_inputs(type(module), make, row)
        module_checks.check_module(type(module), called.accepted, forward, loss, shapes, example_batch)
    return functions.make_functions(init, forward, loss, stateful=bool(collections))


class _Called:
    """A module, and how it is called with fields of a batch."""

    def __init__(self, module: flax_linen.Module, fields: Sequence[str], example_batch: Mapping[str, Any]):
        self.fields, self.accepted = fields, inspect.signature(type(module).__call__).parameters
        self._module, self._example_batch = module, example_batch

    def row(self) -> dict[str, np.ndarray]:
        """Return a row of zeros, which the module is created with."""
        taken = {name: leaf for name, leaf in self._example_batch.items() if name in (*self.fields, SEGMENT_IDS)}
        return {name: np.zeros((1, *leaf.shape[1:]), leaf.dtype) for name, leaf in taken.items()}

    def make(self, key: jax.Array, row: Batch) -> tuple[PyTree, PyTree]:
        """Return new params and model_state."""
        switches = functions.switches(self.accepted, row, train=False)
        variables = self._module.init(key, *(row[name] for name in self.fields), **switches)
        model_state = {name: variables[name] for name in variables if name != "params"}
        return variables.get("params", {}), model_state

    def apply(
        self,
        streams: Sequence[str],
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        key: jax.Array,
        *,
        mutable: Sequence[str],
        train: bool,
    ) -> tuple[Any, PyTree]:
        """Return the outputs and the new variables of the `mutable` collections, with keys of these random streams."""
        outputs, new_state = self._module.apply(
            {"params": unboxed(params), **(model_state or {})},
            *(batch[name] for name in self.fields),
            rngs=_stream_keys(streams, key),
            mutable=list(mutable),
            **functions.switches(self.accepted, batch, train),
        )
        return outputs, new_state


def _stream_keys(streams: Sequence[str], key: jax.Array) -> dict[str, jax.Array]:
    """Return a key for each random stream. The first one has the step's key itself."""
    return {name: jax.random.fold_in(key, index) if index else key for index, name in enumerate(streams)}


def _streams_of(call_with: Callable[[Sequence[str]], Callable[..., Any]], args: Sequence[Any]) -> tuple[str, ...]:
    """Return the names of the random streams that a Linen module draws from in training.

    With no stream given, Linen raises an error that names the one it asked for. Given the stream `params` alone, it
    would draw from that in place of every other, and lifted transformations (`nn.scan`, `nn.vmap`, `nn.RNN`), which
    split streams by name, would not find the one they are to split: every time step would drop the same features.

    Args:
      call_with: `call_with(streams)` calls the module with keys of these streams.
      args: shapes of what it is called with; no values, which would enter a program that is being traced.
    """
    streams: list[str] = []
    while True:
        looked_for: list[str] = []
        try:
            with _noting_has_rng(looked_for):
                jax.eval_shape(call_with(streams), *args)
        except flax_errors.InvalidRngError as error:
            asked = re.search(r'PRNG for "([^"]+)"', str(error))
            if asked is None or asked[1] in streams:
                raise
            streams.append(asked[1])
            continue
        # A module that draws only where it finds a stream raises nothing, and would never draw.
        missing = [name for name in dict.fromkeys(looked_for) if name not in (*streams, "params")]
        if not missing:
            return tuple(streams)
        streams += missing


@contextlib.contextmanager
def _noting_has_rng(names: list[str]) -> Iterator[None]:
    """Append the streams that Linen modules look for with `has_rng` to `names` while the context lasts."""
    has_rng = flax_linen.Module.has_rng

    def noting(module: flax_linen.Module, name: str) -> bool:
        names.append(name)
        return has_rng(module, name)

    with mock.patch.object(flax_linen.Module, "has_rng", noting):
        yield
