"""An optimized program as Python objects: its computations, each a list of instructions in the order they run.

The text is that of `compiled.as_text()`. Only what the estimates need is read: names, shapes, operands, called
computations and metadata. The syntax is that of XLA's own printer (https://openxla.org/xla/operation_semantics).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_HEAD = re.compile(r"(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\) -> .*\{$")
_NAMED = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = ")
_OPERAND = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(r"\b(?:body|to_apply|calls|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"(?P<type>pred|token|opaque|[a-z]+\d+\w*)\[(?P<dims>[^\]]*)\](?:\{(?P<layout>[^}]*)\})?")
_TILE = re.compile(r":T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(?P<count>\d+)"')
_ALIASED = re.compile(r"\{(\d*)\}: \(\d+, \{\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape.

    Attributes:
      text: type and dims, as in `f32[8,128]`.
      num_bytes: in memory, with the padding of tiles.
      in_memory: whether it is in the device's main memory and not in a smaller one beside it.
    """

    text: str
    num_bytes: int
    in_memory: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in its program.
      shape: its result, as text.
      opcode: such as `fusion` or `all-reduce`.
      operands: names of the instructions whose results it takes; of a parameter, nothing.
      rest: the text after the operands: attributes and metadata.
      is_root: whether its result is that of its computation.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result: one, or those of a tuple in order."""
        return tuple(_array(match) for match in _ARRAY.finditer(self.shape))

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it runs."""
        branches = _BRANCHES.search(self.rest)
        more = _OPERAND.findall(branches[1]) if branches else []
        return (*_CALLED.findall(self.rest), *more)


@dataclasses.dataclass(frozen=True)
class Program:
    """An optimized program.

    Attributes:
      computations: name -> its instructions, in the order in which they run.
      entry: name of the computation that is the program.
      outputs_in_arguments: numbers of the outputs that are written into the memory of an argument.
    """

    computations: Mapping[str, Sequence[Instruction]]
    entry: str
    outputs_in_arguments: frozenset[int]


def head_of(line: str) -> str | None:
    """Return the name of the computation whose text begins with `line`, None for any other line."""
    head = _HEAD.match(line)
    return head["name"] if head else None


def parse(hlo: str) -> Program:
    """Return the program of an optimized HLO text."""
    computations: dict[str, list[Instruction]] = {}
    current, entry = "", ""
    for line in hlo.splitlines():
        if head := head_of(line):
            current = head
            computations[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current and (instruction := _instruction(line)):
            computations[current].append(instruction)
    first = hlo.partition("\n")[0]
    aliased = first.partition("input_output_alias=")[2].partition("entry_computation_layout=")[0]
    return Program(computations, entry, frozenset(int(each or 0) for each in _ALIASED.findall(aliased)))


def turns(program: Program) -> dict[str, int]:
    """Return how often one run of the program runs each computation; of a conditional, every branch counts."""
    turns: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        turns[name] = turns.get(name, 0) + times
        for instruction in program.computations.get(name, ()):
            trips = _TRIP_COUNT.search(instruction.rest)
            for called in instruction.called:
                visit(called, times * (int(trips["count"]) if trips else 1))

    visit(program.entry, 1)
    return turns


def _instruction(line: str) -> Instruction | None:
    named = _NAMED.match(line)
    if not named:
        return None
    start = named.end()
    after_shape = _end_of_group(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", after_shape)
    closing = _end_of_group(line, opening)
    opcode = line[after_shape:opening].strip()
    operands = () if opcode in ("parameter", "constant") else tuple(_OPERAND.findall(line[opening:closing]))
    return Instruction(
        named["name"], line[start:after_shape], opcode, operands, line[closing:], named["root"] is not None
    )


def _end_of_group(line: str, start: int) -> int:
    """Return the place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(line)):
        depth += (line[place] == "(") - (line[place] == ")")
        if depth == 0:
            return place + 1
    return len(line)


def _array(match: re.Match[str]) -> Array:
    layout = match["layout"] or ""
    space = _SPACE.search(layout)
    text = f"{match['type']}[{match['dims']}]"
    return Array(text, _num_bytes(match["type"], match["dims"], layout), space is None or space[1] == "0")


def _num_bytes(kind: str, dims_text: str, layout: str) -> int:
    if kind in ("token", "opaque"):
        return 0
    dims = [int(length.strip("<=")) for length in dims_text.split(",") if length]
    tile = _TILE.search(layout)
    if tile and dims:
        dims = list(_padded(dims, layout, [int(length) for length in tile[1].split(",")]))
    bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
    return -(-math.prod(dims) * bits // 8)


def _padded(dims: Sequence[int], layout: str, tile: Sequence[int]) -> Iterator[int]:
    """Return the lengths in memory, from the slowest dim on, the last ones rounded up to whole tiles."""
    minor_first = [int(dim) for dim in layout.partition(":")[0].split(",") if dim] or [0]
    lengths = [dims[dim] for dim in reversed(minor_first)]
    for place, length in enumerate(lengths):
        in_tile = place - (len(lengths) - len(tile))
        yield length if in_tile < 0 else -(-length // tile[in_tile]) * tile[in_tile]
