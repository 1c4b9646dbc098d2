"""What a compiled program sends between devices, read off its optimized HLO.

The bytes are those that one device sends in a ring (Patarasuk and Yuan, 2009): for M bytes over n devices, reduce-
scatter and all-gather M (n-1)/n each, all-reduce both.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(rf"= (?P<shape>\(.*?\)|\S+) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\((?P<rest>.*)")
_ARRAY = re.compile(r"(?P<type>pred|[a-z]+\d+\w*)\[(?P<dims>[\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\{\{(?P<first>[\d,]*)\}|\[(?P<groups>\d+),(?P<size>\d+)\])")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(?P<mesh>[^\]]*)\]\s*(?:,[^{]*)?\{(?P<axes>[^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute.
      num_bytes: size of what it is about, whole: the gathered result, or what is reduced on each device.
      num_devices: devices that take part together.
    """

    kind: str
    num_bytes: int
    num_devices: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends, in a ring."""
        if self.kind == "collective-permute":
            return float(self.num_bytes)
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.num_bytes * (self.num_devices - 1) / self.num_devices


def collectives(hlo: str) -> list[Collective]:
    """Return the collectives of an optimized program, `compiled.as_text()`; each counts once, also inside a loop."""
    return [
        _collective(match)
        for line in hlo.splitlines()
        if (match := _INSTRUCTION.search(line)) and _num_devices(match) != 1
    ]


def sent_bytes(found: Iterable[Collective]) -> float:
    """Return the bytes that each device sends in all of `found`."""
    return sum(each.sent_bytes for each in found)


def summarize(found: Iterable[Collective]) -> dict[str, tuple[int, float]]:
    """Return for each kind that occurs (how many, bytes each device sends in them)."""
    kinds: dict[str, list[Collective]] = {}
    for each in found:
        kinds.setdefault(each.kind, []).append(each)
    return {kind: (len(group), sent_bytes(group)) for kind, group in sorted(kinds.items())}


def _collective(match: re.Match[str]) -> Collective:
    kind, num_devices = match["kind"], _num_devices(match)
    shapes = [_num_bytes(array) for array in _ARRAY.finditer(match["shape"])]
    if match["start"] and kind != "all-reduce":
        shapes = shapes[len(shapes) // 2 :]  # The result of a -start is the pair (operands, results).
    size = sum(shapes)
    return Collective(kind, size * num_devices if kind == "reduce-scatter" else size, num_devices)


def _num_devices(match: re.Match[str]) -> int:
    if match["kind"] == "collective-permute":
        return 2
    if mesh := _MESH_GROUPS.search(match["rest"]):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh["mesh"])}
        # An axis may be named in part, 'axis_0':(1)4 is four places of it.
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh["axes"])
        return math.prod(int(part) if part else sizes[name] for name, part in named)
    groups = _GROUPS.search(match["rest"])
    assert groups is not None, f"a collective whose groups are written in an unknown way: {match['rest'][:200]}"
    return int(groups["size"]) if groups["size"] else len(groups["first"].split(","))


def _num_bytes(array: re.Match[str]) -> int:
    bits = 8 if array["type"] == "pred" else int(re.findall(r"\d+", array["type"])[0])
    return math.prod(int(length) for length in array["dims"].split(",") if length) * bits // 8
