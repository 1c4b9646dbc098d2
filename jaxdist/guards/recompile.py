"""The check for a second compile of the step: it names the argument to blame and what changed."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.spmd.layout import path_name

_MAX_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Change:
    """What of one argument differs from an earlier call: `what` is dtype, weak type, shape, sharding or presence."""

    path: str
    what: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.path} changed {self.what}: {self.old} -> {self.new}"


@dataclasses.dataclass(frozen=True)
class Recompile:
    """A second compile of the step: the `count`-th in all, and how its arguments differ from the nearest known ones."""

    count: int
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        shown = "; ".join(map(str, self.changes[:_MAX_SHOWN]))
        more = f"; and {len(self.changes) - _MAX_SHOWN} more" if len(self.changes) > _MAX_SHOWN else ""
        return (
            f"The step was compiled again (compile {self.count}): {shown}{more}. "
            "Give every call arguments of one form: create the state with its final shardings, pad the last batch, "
            "cast inputs to one dtype."
        )


@dataclasses.dataclass(frozen=True)
class _Form:
    """What of an argument decides whether a compiled program fits it."""

    dtype: str
    weak_type: bool
    shape: tuple[int, ...]
    sharding: str

    def changes(self, path: str, new: "_Form") -> list[Change]:
        pairs = {
            field.name: (getattr(self, field.name), getattr(new, field.name)) for field in dataclasses.fields(self)
        }
        return [
            Change(path, name.replace("_", " "), str(before), str(after))
            for name, (before, after) in pairs.items()
            if before != after
        ]


class RecompileSentinel:
    """Notices when a step is compiled a second time, and which argument is to blame.

    Costs a look at the jitted function's cache per step, under a microsecond; for a step that is not one jitted
    function (several programs, for example) a look at the form of every argument.

    >>> sentinel = RecompileSentinel()
    >>> double = jax.jit(lambda x: 2 * x)
    >>> for x in (jnp.ones(2), jnp.ones(3)):
    ...     _ = double(x)
    ...     recompile = sentinel.observe(double, (x,), names=("x",))
    >>> print(recompile.changes[0])
    x changed shape: (2,) -> (3,)
    """

    def __init__(self, compiled: Callable[..., Any] | None = None) -> None:
        """Watch a step; `compiled` is one that an earlier run may have called, whose programs count as no compile."""
        cache_size = getattr(compiled, "_cache_size", int)()
        self._inherits = cache_size > 0
        self.compile_count = 0
        self._cache_size: int | None = None
        self._last: list[Any] | None = None
        self._known: list[dict[str, _Form]] = []

    def observe(
        self, step_fn: Callable[..., Any], args: Sequence[Any], *, names: Sequence[str] = ("state", "batch")
    ) -> Recompile | None:
        """Return what changed if the call just made was the first of its form, so that the step was compiled again.

        One sentinel watches one step. Donated arrays are fine: only the form of `args` is looked at; `names` are for
        the report.
        """
        if not self._may_have_compiled(step_fn, args):
            return None
        # The cache also grows without a compile (for example where a key's data is described in another way).
        forms = _forms(args, names)
        if forms in self._known:
            return None
        nearest = min((_compare(known, forms) for known in self._known), key=len, default=None)
        self._known.append(forms)
        self.compile_count = len(self._known) - self._inherits
        return None if nearest is None else Recompile(self.compile_count, tuple(nearest))

    def _may_have_compiled(self, step_fn: Callable[..., Any], args: Sequence[Any]) -> bool:
        cache_size = getattr(step_fn, "_cache_size", None)
        if cache_size is not None:
            before, self._cache_size = self._cache_size, cache_size()
            return before != self._cache_size
        # The outputs of a program share their types and shardings from call to call, so comparing is comparing
        # addresses, for all but the arguments that changed.
        last, self._last = self._last, [_quick_form(leaf) for leaf in jax.tree.leaves(args)]
        return last != self._last


def _forms(args: Sequence[Any], names: Sequence[str]) -> dict[str, _Form]:
    forms: dict[str, _Form] = {}
    for name, arg in zip(names, args, strict=True):
        for path, leaf in jax.tree_util.tree_leaves_with_path(arg):
            forms[f"{name}/{path_name(path)}".rstrip("/")] = _form(leaf)
    return forms


def _quick_form(leaf: Any) -> tuple[Any, Any]:
    # Not isinstance: checking for a jax.Array takes longer than everything else here.
    return (leaf.aval, leaf.sharding) if hasattr(leaf, "aval") else (jax.typeof(leaf), None)


def _form(leaf: Any) -> _Form:
    aval = jax.typeof(leaf)
    # What is not committed to devices (numpy arrays never are) goes where the program goes, and decides nothing.
    sharding = _show_sharding(leaf.sharding) if getattr(leaf, "committed", False) else "uncommitted"
    return _Form(str(aval.dtype), bool(getattr(aval, "weak_type", False)), tuple(aval.shape), sharding)


def _show_sharding(sharding: jax.sharding.Sharding) -> str:
    if not isinstance(sharding, NamedSharding):
        return str(sharding)
    entries = list(sharding.spec)
    while entries and entries[-1] is None:
        entries.pop()
    ids = [device.id for device in sharding.mesh.devices.flat]
    return f"{PartitionSpec(*entries)} on mesh {dict(sharding.mesh.shape)} of devices {ids[0]} to {ids[-1]}"


def _compare(old: Mapping[str, _Form], new: Mapping[str, _Form]) -> list[Change]:
    changes = [Change(path, "presence", "there", "gone") for path in old if path not in new]
    for path, form in new.items():
        changes += old[path].changes(path, form) if path in old else [Change(path, "presence", "not there", "there")]
    return changes
