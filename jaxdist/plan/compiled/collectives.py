"""What a compiled program sends between devices, read from its optimized HLO.

The bytes are those that one device sends in a ring (Patarasuk and Yuan, 2009): for M bytes over n devices, reduce-
scatter and all-gather M (n-1)/n each, all-reduce both.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from jaxdist.plan.compiled.program import head_of, parse, turns
from jaxdist.plan.compiled.source_lines import SourceLines

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(rf"= (?P<shape>\(.*?\)|\S+) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\((?P<rest>.*)")
_ARRAY = re.compile(r"(?P<type>pred|[a-z]+\d+\w*)\[(?P<dims>[\d,]*)\]")
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{(?P<first>[\d,]*)\}|"
    r"\[(?P<groups>\d+),(?P<size>\d+)\](?:<=\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?)?)"
)
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(?P<mesh>[^\]]*)\]\s*(?:,[^{]*)?\{(?P<axes>[^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute.
      num_bytes: size of the whole array: the gathered result, or what is reduced on each device.
      num_devices: number of devices in a group.
      devices: one group of devices, by their places in the mesh.
      times: how often the program runs it: once, or once per iteration of the loops it is in.
      caused_by: `FILE:LINE` of the code that it comes from; empty where the program does not say.
    """

    kind: str
    num_bytes: int
    num_devices: int
    devices: tuple[int, ...] = ()
    times: int = 1
    caused_by: str = ""

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends in a ring, summed over all times."""
        if self.kind == "collective-permute":
            return float(self.times * self.num_bytes)
        passes = 2 if self.kind == "all-reduce" else 1
        return self.times * passes * self.num_bytes * (self.num_devices - 1) / self.num_devices

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """Return the axes of the mesh (name -> size) along which the devices of a group differ."""
        places = np.array(np.unravel_index(np.array(self.devices, int), tuple(mesh.values())))
        return tuple(name for name, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1)


def collectives(hlo: str) -> list[Collective]:
    """Return the collectives of an optimized program, `compiled.as_text()`.

    One inside a loop counts once per iteration where the program gives the number of iterations (as of a `scan`), else
    once.
    """
    times, lines = turns(parse(hlo)), SourceLines(hlo)
    found, computation = [], ""
    for line in hlo.splitlines():
        computation = head_of(line) or computation
        match = _INSTRUCTION.search(line)
        if match and _num_devices(match) > 1:
            found.append(
                dataclasses.replace(_collective(match), times=times.get(computation, 1), caused_by=lines.of(line))
            )
    return found


def sent_bytes(found: Iterable[Collective]) -> float:
    """Return the bytes that each device sends in all of `found`."""
    return sum(each.sent_bytes for each in found)


def summarize(found: Iterable[Collective]) -> dict[str, tuple[int, float]]:
    """Return, for each kind that occurs, how many there are and how many bytes each device sends in them."""
    kinds: dict[str, list[Collective]] = {}
    for each in found:
        kinds.setdefault(each.kind, []).append(each)
    return {kind: (sum(each.times for each in group), sent_bytes(group)) for kind, group in sorted(kinds.items())}


def _collective(match: re.Match[str]) -> Collective:
    kind, num_devices = match["kind"], _num_devices(match)
    shapes = [_num_bytes(array) for array in _ARRAY.finditer(match["shape"])]
    if match["start"] and kind != "all-reduce":
        shapes = shapes[len(shapes) // 2 :]  # The result of a -start is the pair (operands, results).
    size = sum(shapes)
    total = size * num_devices if kind == "reduce-scatter" else size
    return Collective(kind, total, num_devices, _group(match["rest"]))


def _num_devices(match: re.Match[str]) -> int:
    return 2 if match["kind"] == "collective-permute" else len(_group(match["rest"]))


def _group(rest: str) -> tuple[int, ...]:
    """Return the devices of the first group, from the text after an instruction's operands."""
    if pair := _PAIRS.search(rest):
        return int(pair[1]), int(pair[2])
    if mesh := _MESH_GROUPS.search(rest):
        return _mesh_group(mesh["mesh"], mesh["axes"])
    groups = _GROUPS.search(rest)
    assert groups is not None, f"unknown syntax of the groups of a collective: {rest[:200]}"
    if groups["first"]:
        return tuple(map(int, groups["first"].split(",")))
    # [G,S]<=[dims]T(order): the numbers from 0 on, in those dims, transposed, cut into G groups of S.
    size = int(groups["size"])
    dims = [int(length) for length in (groups["dims"] or f"{int(groups['groups']) * size}").split(",")]
    order = [int(dim) for dim in groups["order"].split(",")] if groups["order"] else range(len(dims))
    devices = np.arange(math.prod(dims)).reshape(dims).transpose(tuple(order))
    return tuple(devices.reshape(-1)[:size].tolist())


def _mesh_group(mesh: str, axes: str) -> tuple[int, ...]:
    """Return the first group over the named axes; 'axis_0':(1)4 is a part of an axis, four devices with stride n/4."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    names = list(sizes)
    steps = []
    for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        count = int(part) if part else sizes[name]
        stride = math.prod(sizes[each] for each in names[names.index(name) + 1 :])
        inside = sizes[name] // (int(before or 1) * count)
        steps.append([stride * inside * each for each in range(count)])
    return tuple(sum(each) for each in itertools.product(*steps))


def _num_bytes(array: re.Match[str]) -> int:
    bits = 8 if array["type"] == "pred" else int(re.findall(r"\d+", array["type"])[0])
    return math.prod(int(length) for length in array["dims"].split(",") if length) * bits // 8
