"""Which leaf of a file becomes which leaf of the model, by their names; every leaf of both is accounted for."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from jaxdist.config.starting_weights import InitFrom, WeightRule
from jaxdist.errors import ConfigError
from jaxdist.setting_group import nearest

_HOMES = ("", "params/", "model_state/")
"""What may be missing at the beginning of a name: a file of params alone has no `params/`."""
_OF_TRANSFORMERS = re.compile(r"(^|/)(h/\d+/attn|encoder/layer|encoder/stages|embedder)/")
_MOST_NAMED = 6


@dataclasses.dataclass(frozen=True)
class Match:
    """Every leaf of a file and of a model.

    Attributes:
      loaded: leaf of the model -> leaf of the file.
      rules: leaf of the file -> the rule that was found for it.
      left: leaves of the file that are left out on purpose.
      fresh: leaves of the model that begin as without weights.
    """

    loaded: Mapping[str, str]
    rules: Mapping[str, WeightRule]
    left: tuple[str, ...]
    fresh: tuple[str, ...]


def match(names: Sequence[str], model: Mapping[str, str], settings: InitFrom, *, source: str) -> Match:
    """Return what becomes of each leaf.

    `names` are those of the leaves of the file; `model` maps each name that a leaf of the model may have to its own
    name; `source` is for messages.

    Raises:
      ConfigError: a leaf of the file has no place in the model or one of the model no value, unless a rule or `fresh`
        says so; two have one place; a rule or a pattern of `fresh` matches nothing.
    """
    leaves = tuple(dict.fromkeys(model.values()))
    rules = {name: rule for name in names if (rule := _rule_of(settings.rules, name))}
    _check_used(settings, names, leaves, source)
    fresh = tuple(leaf for leaf in leaves if any(re.search(pattern, leaf) for pattern in settings.fresh))
    loaded: dict[str, str] = {}
    left, homeless = [], []
    for name in names:
        place = _place(name, rules.get(name), model)
        if place in fresh or (name in rules and rules[name].leave_out):
            left.append(name)
        elif place is None:
            homeless.append(name)
        elif place in loaded:
            raise ConfigError(
                f"A leaf of the model takes one of {source}; {loaded[place]} and {name} both become {place}. Leave one "
                "out by a WeightRule."
            )
        else:
            loaded[place] = name
    missing = [leaf for leaf in leaves if leaf not in loaded and leaf not in fresh]
    if homeless or missing or not loaded:
        raise ConfigError(_explain(homeless, missing, left, fresh, loaded, source))
    return Match(loaded, rules, tuple(left), fresh)


def _rule_of(rules: Sequence[WeightRule], name: str) -> WeightRule | None:
    return next((rule for rule in rules if re.search(rule.pattern, name)), None)


def _place(name: str, rule: WeightRule | None, model: Mapping[str, str]) -> str | None:
    """Return the leaf of the model that a leaf of the file belongs to; None if there is no such leaf."""
    if rule is not None and rule.to is not None:
        try:
            name = re.sub(rule.pattern, rule.to, name, count=1)
        except (re.error, IndexError) as error:
            raise ConfigError(f"WeightRule.to must be a replacement for its pattern; {rule.to!r}: {error}.") from error
    return next((model[home + name] for home in _HOMES if home + name in model), None)


def _check_used(settings: InitFrom, names: Sequence[str], leaves: Sequence[str], source: str) -> None:
    """Raise ConfigError for a rule or a pattern that never decides anything."""
    for rule in settings.rules:
        if not any(_rule_of(settings.rules, name) is rule for name in names):
            shadowed = any(re.search(rule.pattern, name) for name in names)
            why = "earlier rules match first" if shadowed else f"no leaf matches.{nearest(rule.pattern, names)}"
            raise ConfigError(f"Every WeightRule decides about a leaf of {source}; for {rule.pattern!r}, {why}")
    for pattern in settings.fresh:
        if not any(re.search(pattern, leaf) for leaf in leaves):
            raise ConfigError(
                f"Every pattern of init_from.fresh is found in a leaf of the model; {pattern!r} is not."
                f"{nearest(pattern, leaves)}"
            )


def _explain(
    homeless: Sequence[str],
    missing: Sequence[str],
    left: Sequence[str],
    fresh: Sequence[str],
    loaded: Mapping[str, str],
    source: str,
) -> str:
    found = [f"init_from accounts for every leaf of the model and of {source}."]
    if missing:
        found.append(f"Missing, of the model: {_named(missing)}.")
    if homeless:
        found.append(f"Without a place in the model, of {source}: {_named(homeless)}.")
    found.append(f"Loaded: {len(loaded)}; left out: {len(left)}; fresh: {len(fresh)}.")
    if any(_OF_TRANSFORMERS.search(name) for name in homeless):
        found.append("These look like names of transformers: set init_from.names to hugging-face.")
    elif not loaded:
        found.append("Nothing would be loaded: rename leaves by init_from.rules.")
    else:
        found.append("Rename or leave out by init_from.rules, or name in init_from.fresh what begins at random.")
    return " ".join(found)


def _named(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
