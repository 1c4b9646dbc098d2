"""NNX modules as functions of arrays: variables become nested dicts, random state is made anew in each call."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx as flax_nnx
from flax import traverse_util

from jaxdist.adapters import functions, module_checks, nnx_templates
from jaxdist.adapters.functions import Functions, Loss, PyTree
from jaxdist.spmd.metrics import Batch
from jaxdist.spmd.precision import Precision


def nnx(
    make_module: Callable[[flax_nnx.Rngs], flax_nnx.Module],
    loss: Loss,
    example_batch: Mapping[str, Any],
    *,
    inputs: str | Sequence[str] = "image",
    precision: Precision = "float32",
    is_checked: bool = False,
) -> Functions:
    """Return the functions of an NNX module.

    params and model_state are plain nested dicts keyed by the module's attribute names. `nnx.Param`s are params, all
    other variables model_state, except random state: that is created from the key given to loss_fn in each call, so
    that a step remains a function of its arguments and a checkpoint needs no hidden counters.

    `make_module(rngs)` builds the module. It is called as `module(*inputs)`, with `train=` and `mask=` if it takes
    them, after `module.train()` or `module.eval()`. Of the example batch only the field names are used; for the rest
    see `linen`.

    Raises:
      ValueError: see `linen`.
    """
    fields = module_checks.input_fields(inputs, example_batch)
    template = nnx_templates.Template.of(make_module)
    accepted = inspect.signature(template.module_type.__call__).parameters
    module_checks.check_call(template.module_type, accepted, fields, example_batch)
    constants = nnx_templates.arrays(template.constants, template.constants)

    def call(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array, *, train: bool, constants: PyTree = constants
    ) -> tuple[Any, flax_nnx.Module]:
        module: Any = template.module(params, model_state, key, constants)
        module.train() if train else module.eval()
        return module(*(batch[name] for name in fields), **functions.switches(accepted, batch, train)), module

    def forward(
        params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array, *, train: bool
    ) -> tuple[Any, PyTree]:
        outputs, module = call(params, model_state, batch, key, train=train)
        return outputs, nnx_templates.arrays(nnx_templates.split_module(module)[3], template.state)

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        return template.initial(make_module, key)

    def fixed_after(fixed: PyTree, model_state: PyTree, batch: Batch, key: jax.Array) -> dict[str, Any]:
        module = call(fixed, model_state, batch, key, train=True, constants=fixed)[1]
        return _fixed(module, template.constants)

    forward = functions.in_precision(forward, precision)
    if not is_checked:
        shapes = jax.eval_shape(init, jax.random.key(0))
        module_checks.check_module(template.module_type, accepted, forward, loss, shapes, example_batch)
        fixed = traverse_util.unflatten_dict(
            {**traverse_util.flatten_dict(shapes[0]), **traverse_util.flatten_dict(constants)}
        )
        module_checks.check_assigns_none(template.module_type, fixed_after, fixed, shapes[1], example_batch)
    return functions.make_functions(init, forward, loss, stateful=bool(template.state))


# What these assign to the params of the layer they hold, they compute from those params anew in every call.
_NORMALIZERS = (flax_nnx.SpectralNorm, flax_nnx.WeightNorm)


def _fixed(module: flax_nnx.Module, constants: Mapping[tuple, Any]) -> dict[str, Any]:
    """Return what a call is not to change, by path: params, and the arrays at the paths of `constants`."""
    _, params, _, rest = nnx_templates.split_module(module)
    normed = [path for path, each in flax_nnx.iter_modules(module) if isinstance(each, _NORMALIZERS)]
    values = {path: each.get_value() for path, each in flax_nnx.to_flat_state(params)}
    others = dict(flax_nnx.to_flat_state(rest))
    values |= {path: others.get(path, 0) for path in constants}  # Flax takes what is assigned in a trace for a setting.
    for under in normed:
        values = {path: value for path, value in values.items() if path[: len(under)] != under}
    return {"/".join(map(str, path)): value for path, value in values.items()}
