"""The settings of models that are sizes: checked when a model is made, by name, not in the middle of its layers."""

import dataclasses
from typing import Any

from jaxdist.setting_group import whole_number

_MAY_BE_NONE = {"num_layers", "num_stages"}


def check(model: Any) -> None:
    """Raise ValueError where a number of something in a model is none, or its dropout rate no probability below 1."""
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.type in (int, int | None) and value is not None:
            whole_number(field.name, value, least=0 if field.name in _MAY_BE_NONE else 1)
    rate = getattr(model, "dropout_rate", 0.0)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate is the probability with which a feature is zeroed, below 1; got {rate}.")
