"""Where the first params of a run come from, in place of random ones: the settings of `Experiment.init_from`."""

import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from jaxdist.errors import ConfigError
from jaxdist.setting_group import setting_group

Which = int | Literal["best", "last"]
"""A checkpoint of a run: a step, the newest, or the best (the newest, where the run watched no metric)."""


@setting_group
class WeightRule:
    r"""What becomes of leaves of a file; of several rules, the first whose pattern is found in a leaf's name decides.

    Attributes:
      pattern: a regular expression, found in names such as `params/block_0/mlp_in/kernel`.
      to: what replaces the part that is found, with `\1` for its first group; None keeps the name.
      function: `function(array) -> array`, applied to the values, for example to reshape or cast them.
      leave_out: whether the leaf is not loaded.
    """

    pattern: str
    to: str | None = None
    function: Callable[[np.ndarray], Any] | None = None
    leave_out: bool = False

    @staticmethod
    def accept(values: dict[str, Any]) -> dict[str, Any]:
        """Return the settings; raise ConfigError for an invalid rule."""
        _check_pattern("WeightRule.pattern", values.get("pattern"))
        changes = values.get("to") is not None or values.get("function") is not None
        if changes == bool(values.get("leave_out", False)):
            raise ConfigError(
                "A WeightRule renames (to), changes values (function) or leaves out (leave_out=True); the one for "
                f"{values.get('pattern')!r} {'does both' if changes else 'does nothing'}. Choose one."
            )
        return values


@setting_group
class InitFrom:
    """Weights that a run begins with: those of another run, or of a file. Every leaf must be accounted for.

    Attributes:
      path: a run directory, a checkpoint in one, an Orbax export, a file that ends in .safetensors, .npz or .msgpack,
        or a folder with safetensors files.
      checkpoint: of a run directory, which: "best", "last" or a step.
      names: `jaxdist`, or `hugging-face` for the names that transformers gives to the weights of GPT-2, ViT and ResNet.
      rules: what becomes of leaves of the file that have another name, shape or no place in the model.
      fresh: regular expressions, found in names of the model's leaves that begin as without `init_from`.
    """

    path: str
    checkpoint: Which = "best"
    names: Literal["jaxdist", "hugging-face"] = "jaxdist"
    rules: tuple[WeightRule, ...] = ()
    fresh: tuple[str, ...] = ()

    @staticmethod
    def accept(values: dict[str, Any]) -> dict[str, Any]:
        """Return the settings with the path as a string; raise ConfigError for an invalid pattern."""
        found = dict(values)
        if hasattr(found.get("path"), "__fspath__"):
            found["path"] = str(found["path"])
        if found.get("path") == "":
            raise ConfigError("InitFrom.path names a run directory or a file of weights; got ''. Name one.")
        if isinstance(found.get("fresh"), str):
            found["fresh"] = (found["fresh"],)
        for pattern in found.get("fresh", ()) if isinstance(found.get("fresh"), tuple | list) else ():
            _check_pattern("InitFrom.fresh", pattern)
        return found


def as_init_from(value: Any) -> Any:
    """Return a path as the settings that load all of it, anything else unchanged."""
    return InitFrom(path=str(value)) if isinstance(value, str) or hasattr(value, "__fspath__") else value


def _check_pattern(setting: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        return  # refused for its kind
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{setting} must be a regular expression; {pattern!r} is not one: {error}.") from error
