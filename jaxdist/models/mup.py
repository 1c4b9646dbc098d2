"""Maximal update parametrization (muP): settings found at a small width hold at a large one.

Tensor Programs V (Yang et al., 2022), Table 8: with m = width / base_width,

| | input weights, biases, norms | hidden weights | output weights |
|---|---|---|---|
| variance of the init | as at the base width | x 1/m | as at the base width |
| multiplier of the output | 1 | 1 | 1/m |
| learning rate, Adam | 1 | x 1/m | 1 |
| learning rate, SGD | x m | 1 | x m |

and attention divides queries times keys by the size of a head, not by its square root. At the base width all of it is
the standard parametrization. A model takes part by fields `width` and `base_width` and a method `width_role(path)`.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

Role: TypeAlias = Literal["vector", "hidden", "output"]
"""Of a param: vector-like has one dim that grows with the width (input weights, biases, norms), or none."""

ADAM_LIKE = ("adam", "adamw", "lion")
"""Optimizers whose updates do not depend on the size of the gradients."""
SGD_LIKE = ("sgd", "momentum", "nesterov")


def multiplier(width: int, base_width: int | None) -> float:
    """Return by how much a model is wider than at its base; 1 without a base width, which is no muP."""
    return 1.0 if base_width is None else width / base_width


def rate_factor(role: Role, optimizer: str, m: float) -> float:
    """Return what the learning rate of a param is multiplied by."""
    if optimizer in ADAM_LIKE:
        return 1 / m if role == "hidden" else 1.0
    return 1.0 if role == "hidden" else m


def rate_factors(model: Any, optimizer: str | None) -> Callable[[str], float] | None:
    """Return the factor of the learning rate of each param by its path; None for a model without muP.

    `optimizer` is its name in `jaxdist.Optimizer`; None for an optimizer of optax itself.

    Raises:
      ValueError: the factors of this optimizer are not known.
    """
    if getattr(model, "base_width", None) is None or not hasattr(model, "width_role"):
        return None
    if optimizer not in (*ADAM_LIKE, *SGD_LIKE):
        what = "an optax optimizer, whose learning rate is inside it" if optimizer is None else optimizer
        raise ValueError(
            f"muP (model.base_width) sets the learning rate of each param, and knows how for {', '.join(SGD_LIKE)}, "
            f"{', '.join(ADAM_LIKE)}; got {what}. Choose one of these, or leave base_width out."
        )
    m = multiplier(model.width, model.base_width)
    return lambda path: rate_factor(model.width_role(path), optimizer, m)
