"""The arrays that are in a device's memory when it is fullest, and the lines of code that made them.

The compiled program is scheduled: its instructions run in the order of its text. An array lives from the instruction
that makes it to the last one that reads it; where an instruction writes into the memory of an operand, as loops and
updates in place do, both are one array. The compiler's own assignment of memory follows the same rules and packs the
arrays; its total is the exact one, and what is listed here explains it.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from jaxdist.plan.compiled.program import Array, Instruction, Program, parse
from jaxdist.plan.compiled.source_lines import SourceLines

_SAME_MEMORY = frozenset({"bitcast", "optimization-barrier", "while", "dynamic-update-slice", "scatter"})
_REUSES_OPERAND = frozenset(
    {"fusion", "add", "subtract", "multiply", "divide", "maximum", "minimum", "select", "negate", "exponential", "tanh"}
)
_COPIES = frozenset({"copy", "copy-start", "copy-done", "bitcast", "transpose", "reshape", "convert", "slice"})
_MOST_COPIES = 8
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Arrays of the same size from the same place that are in memory at the peak.

    Attributes:
      what: the argument's name, such as `state.params['kernel']`, or the operation that made it.
      line: `FILE:LINE` of the code it comes from; empty where the program does not say.
      shape: such as `f32[8,128]`.
      num_bytes: of one of them.
      count: how many there are.
    """

    what: str
    line: str
    shape: str
    num_bytes: int
    count: int = 1


@dataclasses.dataclass
class _Made:
    """An array that an instruction made; `outside` where its memory is counted elsewhere, as of an argument."""

    array: Array
    by: Instruction
    outside: bool = False

    @property
    def num_bytes(self) -> int:
        return self.array.num_bytes if self.array.in_memory and not self.outside else 0


def at_peak(hlo: str) -> list[Buffer]:
    """Return what is in memory at the peak, largest first: arguments, and what the program made until then."""
    program, lines = parse(hlo), SourceLines(hlo)
    arguments = [each for each in program.computations[program.entry] if each.opcode == "parameter"]
    held = [(each, array) for each in arguments for array in each.arrays]
    walk = _Walk(program)
    held += [(made.by, made.array) for made in [*walk.outputs(), *walk.peak(program.entry)]]
    counted: dict[tuple[str, str, int], list[Buffer]] = {}
    by_name = {each.name: each for instructions in program.computations.values() for each in instructions}
    for by, array in held:
        origin = _origin(by, program, by_name)
        made = Buffer(_what(origin), lines.of(origin.rest), array.text, array.num_bytes)
        counted.setdefault((made.line or made.what, made.shape, made.num_bytes), []).append(made)
    found = [dataclasses.replace(same[0], count=len(same)) for same in counted.values() if same[0].num_bytes]
    return sorted(found, key=lambda each: (-each.num_bytes, -each.count, each.what))


def _origin(by: Instruction, program: Program, by_name: Mapping[str, Instruction]) -> Instruction:
    """Return the instruction that says where `by` comes from: itself, one that it fuses, or one that it copies."""
    for _ in range(_MOST_COPIES):
        if _OP_NAME.search(by.rest):
            return by
        inner = program.computations.get((by.called or ("",))[0], ())
        named = [each for each in inner if each.opcode != "parameter" and _OP_NAME.search(each.rest)]
        if named:
            return named[-1]
        if by.opcode not in _COPIES or by.operands[0] not in by_name:
            return by
        by = by_name[by.operands[0]]
    return by


def _what(by: Instruction) -> str:
    named = _OP_NAME.search(by.rest)
    return named[1].replace("\\'", "'") if named else by.opcode


class _Walk:
    """Follows the arrays through the computations of one program."""

    def __init__(self, program: Program):
        self._program = program
        self._peaks: dict[str, list[_Made]] = {}

    def peak(self, name: str) -> list[_Made]:
        """Return what a computation made and has in memory when that is most; its arguments are not among it."""
        if name not in self._peaks:
            self._peaks[name] = self._find_peak(name)
        return self._peaks[name]

    def outputs(self) -> list[_Made]:
        """Return the program's results that are not written into an argument."""
        entry = self._program.computations[self._program.entry]
        root = next(each for each in entry if each.is_root)
        results = enumerate(self._values(self._program.entry)[root.name])
        own = [made for number, made in results if number not in self._program.outputs_in_arguments]
        return [made for made in own if made.by.opcode != "parameter"]

    def _find_peak(self, name: str) -> list[_Made]:
        instructions = self._program.computations[name]
        values = self._values(name)
        last_use = _last_uses(instructions, values)
        live: dict[int, _Made] = {}
        best: list[_Made] = []
        most = 0
        for place, instruction in enumerate(instructions):
            new = {id(made): made for made in values[instruction.name] if made.by is instruction and made.num_bytes}
            _free_reused(live, instruction, values, last_use, place, [made.num_bytes for made in new.values()])
            live |= new
            inner = [made for each in self._inside(instruction) for made in self.peak(each)]
            now = sum(made.num_bytes for made in live.values()) + sum(made.num_bytes for made in inner)
            if now > most:
                most, best = now, [*live.values(), *inner]
            live = {key: made for key, made in live.items() if last_use[key] > place}
        return best

    def _inside(self, instruction: Instruction) -> Sequence[str]:
        """Return the computations whose arrays have memory of their own while the instruction runs."""
        if instruction.opcode in ("while", "call", "conditional"):
            return [each for each in instruction.called if each in self._program.computations][:1]
        return ()

    def _values(self, name: str) -> dict[str, list[_Made]]:
        """Return for each instruction the arrays of its result, in the order of its shape."""
        values: dict[str, list[_Made]] = {}
        for instruction in self._program.computations[name]:
            values[instruction.name] = self._result(instruction, values)
            if instruction.is_root:
                for made in values[instruction.name]:
                    # A result is counted where the computation is called; that of the program has memory of its own.
                    made.outside = True
        return values

    def _result(self, instruction: Instruction, values: dict[str, list[_Made]]) -> list[_Made]:
        opcode, arrays = instruction.opcode, instruction.arrays
        operands = [values.get(each, []) for each in instruction.operands]
        first = operands[0] if operands else []
        if opcode == "tuple":
            return [made for operand in operands for made in operand]
        if opcode == "get-tuple-element":
            index = re.search(r"index=(\d+)", instruction.rest)
            number = int(index[1]) if index else 0
            return [first[number]] if len(arrays) == 1 and number < len(first) else first
        if opcode.endswith("-done"):
            own = [made for made in first if made.by.opcode.endswith("-start")]
            return (own or first)[: len(arrays)]
        if opcode.endswith("-start"):
            return _started(instruction, first)
        if opcode in _SAME_MEMORY and len(first) == len(arrays):
            return first
        if opcode == "fusion" and (updated := self._updated(instruction, operands)):
            return [updated]
        outside = opcode in ("parameter", "constant")
        return [_Made(array, instruction, outside) for array in arrays]

    def _updated(self, instruction: Instruction, operands: Sequence[list[_Made]]) -> _Made | None:
        """Return the operand that a fusion updates in place, if its root is such an update."""
        inner = self._program.computations.get((instruction.called or ("",))[0], ())
        root = next((each for each in inner if each.is_root), None)
        if root is None or root.opcode not in ("dynamic-update-slice", "scatter") or len(instruction.arrays) != 1:
            return None
        same = (each[0] for each in operands if len(each) == 1 and each[0].array.text == instruction.arrays[0].text)
        return next(same, None)


def _started(instruction: Instruction, first: list[_Made]) -> list[_Made]:
    """Return the result of an instruction that begins a copy or a collective: its operands are in it, too."""
    made = [_Made(array, instruction) for array in instruction.arrays]
    if instruction.opcode == "copy-start":
        return [made[0], *first[:1]]
    if instruction.opcode == "all-reduce-start":
        return made
    return [*first, *made[len(first) :]]


def _last_uses(instructions: Sequence[Instruction], values: dict[str, list[_Made]]) -> dict[int, int]:
    """Return for each array the place of the last instruction that reads it; a result is read at the end."""
    found: dict[int, int] = {}
    for place, instruction in enumerate(instructions):
        for name in (instruction.name, *instruction.operands):
            for made in values.get(name, []):
                found[id(made)] = len(instructions) if instruction.is_root else place
    return found


def _free_reused(
    live: dict[int, _Made],
    instruction: Instruction,
    values: dict[str, list[_Made]],
    last_use: dict[int, int],
    place: int,
    sizes: list[int],
) -> None:
    """Remove from `live` an operand read for the last time, whose memory a result of one of the `sizes` takes."""
    if instruction.opcode not in _REUSES_OPERAND:
        return
    for operand in instruction.operands:
        for made in values.get(operand, []):
            if last_use[id(made)] == place and made.num_bytes in sizes and id(made) in live:
                sizes.remove(made.num_bytes)
                del live[id(made)]
