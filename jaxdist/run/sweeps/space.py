"""What a sweep tries: the values or the range of each setting, and the trials that a grid or chance makes of them.

A setting has its value as the text that `--set` takes, so a trial is what a user can type again.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from jaxdist.errors import ConfigError

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER})(:log)?")
_EXAMPLES = "optimizer.learning_rate=1e-4,3e-4,1e-3, or a range 1e-5:1e-2:log"
_OPENING, _CLOSING = "([{", ")]}"


@dataclasses.dataclass(frozen=True)
class Choices:
    """Values of the setting `path`, as texts."""

    path: str
    values: tuple[str, ...]

    def draw(self, random: np.random.Generator) -> str:
        """Return one of the values, each as likely."""
        return self.values[int(random.integers(len(self.values)))]

    @property
    def ends(self) -> tuple[str, ...]:
        """The values that are tried first, to find mistakes."""
        return self.values


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers of the setting `path` between two that belong to it; `whole` where both are written as whole numbers."""

    path: str
    low: float
    high: float
    log: bool
    whole: bool

    def draw(self, random: np.random.Generator) -> str:
        """Return a number of the range, or of its logarithm, each as likely."""
        low, high = (self.low - 0.5, self.high + 0.5) if self.whole else (self.low, self.high)
        if self.log:
            return self.text(math.exp(random.uniform(math.log(low), math.log(high))))
        return self.text(random.uniform(low, high))

    def text(self, value: float) -> str:
        """Return a number as the setting gets it: within the range, with four significant digits unless it is whole."""
        within = min(max(value, self.low), self.high)
        if self.whole:
            return str(min(max(round(within), int(self.low)), int(self.high)))
        return f"{min(max(float(f'{within:.4g}'), self.low), self.high):.10g}"

    @property
    def ends(self) -> tuple[str, ...]:
        """The values that are tried first, to find mistakes."""
        return (self.text(self.low), self.text(self.high))


Setting: TypeAlias = Choices | Range


def parse(texts: Sequence[str]) -> list[Setting]:
    """Return what `--over` names: NAME=VALUE,VALUE,... or NAME=LOW:HIGH or NAME=LOW:HIGH:log, each name once.

    Raises:
      ConfigError: it is neither, or a value or a name is there twice.
    """
    found = [_parse(text) for text in texts]
    paths = [setting.path for setting in found]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"--over names each setting once; got {path} {paths.count(path)} times. Join the values.")
    return found


def _parse(text: str) -> Setting:
    path, equals, right = text.partition("=")
    if not equals or not path or not right:
        raise ConfigError(f"--over takes NAME=VALUES, for example {_EXAMPLES}; got {text!r}.")
    if match := _RANGE.fullmatch(right):
        return _range(path, match[1], match[2], log=match[3] is not None)
    values = tuple(_split(right))
    if "" in values:
        raise ConfigError(f"--over takes values between commas; one of {text!r} is empty. Remove the comma.")
    return Choices(path, values)


def _range(path: str, first: str, last: str, *, log: bool) -> Range:
    low, high = float(first), float(last)
    written = f"{path}={first}:{last}{':log' if log else ''}"
    if not low < high or math.isinf(low) or math.isinf(high):
        raise ConfigError(f"A range goes from a number to a larger one; got {written}. Exchange or change them.")
    if log and low <= 0:
        raise ConfigError(f"A range with :log begins above 0; got {written}. Raise its beginning, or leave :log out.")
    return Range(path, low, high, log, whole=all(re.fullmatch(r"[+-]?\d+", end) for end in (first, last)))


def _split(text: str) -> Iterator[str]:
    """Return the parts between commas that are in no brackets: a value may be a tuple."""
    depth, part = 0, ""
    for character in text:
        depth += (character in _OPENING) - (character in _CLOSING)
        if character == "," and depth == 0:
            yield part
            part = ""
        else:
            part += character
    yield part


def grid(settings: Sequence[Setting], last: Sequence[str] = ()) -> list[dict[str, str]]:
    """Return every combination of the values; those of the settings `last` change fastest.

    Raises:
      ConfigError: a setting has a range.
    """
    for setting in settings:
        if isinstance(setting, Range):
            raise ConfigError(
                f"A grid needs the values themselves, and {setting.path} has a range. List values between commas, or "
                "draw from the range: --random --trials N, or --optuna --trials N."
            )
    choices = [setting for setting in settings if isinstance(setting, Choices)]
    ordered = sorted(choices, key=lambda setting: setting.path in last)
    paths = [setting.path for setting in settings]
    combined = itertools.product(*(setting.values for setting in ordered))
    found = [dict(zip([setting.path for setting in ordered], values, strict=True)) for values in combined]
    return [{path: each[path] for path in paths} for each in found]


MOST_DRAWS = 1000


def draws(settings: Sequence[Setting], count: int, seed: int) -> list[dict[str, str]]:
    """Return `count` different trials drawn by chance; the first ones are the same for every larger `count`.

    Raises:
      ConfigError: there are not so many.
    """
    random = np.random.default_rng(seed)
    found: list[dict[str, str]] = []
    for _ in range(count):
        for _ in range(MOST_DRAWS):
            drawn = {setting.path: setting.draw(random) for setting in settings}
            if drawn not in found:
                break
        else:
            raise ConfigError(
                f"--random draws trials that differ, and there are not {count} of them: {len(found)} were found. "
                "Lower --trials, or leave --random out for all combinations."
            )
        found.append(drawn)
    return found
