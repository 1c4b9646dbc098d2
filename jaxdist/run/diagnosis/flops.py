"""FLOPs of a traced function: its matrix products and convolutions, counted in the jaxpr.

A multiplication and an addition are two FLOPs. The body of a loop counts once per iteration, unlike in the counts of
compilers. What the backward pass computes again (remat) counts again.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def count(closed: core.ClosedJaxpr) -> float:
    """Return the FLOPs of one call, over all devices."""
    return sum(_of_equation(equation) for equation in closed.jaxpr.eqns)


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _of_dot(equation)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if name == "cond":
        return max(map(_of_jaxpr, params["branches"]))
    inner = sum(_of_jaxpr(each) for each in _jaxprs(params))
    if name == "scan":
        return inner * params["length"]
    if name == "shard_map":
        mesh = params["mesh"]
        # Inside, shapes are those of one device; every device of the manual axes does the same.
        manual = params.get("manual_axes") or params.get("newly_manual_axes") or mesh.axis_names
        return inner * math.prod(mesh.shape[axis] for axis in manual)
    return inner


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(each, "eqns") or hasattr(each, "jaxpr"):
                yield each


def _of_jaxpr(jaxpr: Any) -> float:
    return sum(_of_equation(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _of_dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[dim] for dim in contracted)


def _of_convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    out_dim = equation.params["dimension_numbers"].rhs_spec[0]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[out_dim]
