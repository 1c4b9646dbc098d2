"""What a compiled program executes, operation by operation: of which kind, its arithmetic, its memory traffic.

An operation is an instruction that runs by itself: a fusion counts as one, with the arithmetic of what is inside it and
the traffic of its operands and results alone. One in a loop counts once per iteration.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdist.plan.compiled.program import Instruction, Program, parse, turns

MATMUL, CONVOLUTION, COLLECTIVE, INDEXING, REDUCTION, TRANSPOSE, ELEMENTWISE = (
    "matmul", "convolution", "collective", "indexing", "reduction", "transpose", "elementwise",
)  # fmt: skip
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
     "partition-id", "replica-id", "optimization-barrier"}
)  # fmt: skip
_MOVES = frozenset({"broadcast", "reshape", "bitcast", "parameter", "constant", "iota", "copy", "transpose", "slice",
                    "tuple", "get-tuple-element", "concatenate", "pad"})  # fmt: skip
_COSTLY = frozenset({"exponential", "log", "tanh", "logistic", "power", "rsqrt", "sqrt", "divide", "sine", "cosine",
                     "erf", "exponential-minus-one", "log-plus-one", "cbrt", "tan", "atan2", "remainder"})  # fmt: skip
_UPDATE = "dynamic-update-slice"
_INDEXED = frozenset({"gather", "scatter", "sort", "dynamic-slice", _UPDATE})
_DIMS = re.compile(r"\[([\d,]*)\]")
_MINOR_TO_MAJOR = re.compile(r"\{([\d,]+)[:}]")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_BATCHED = re.compile(r"lhs_batch_dims=\{([\d,]*)\}")
_REDUCED = re.compile(r"dimensions=\{([\d,]*)\}")
_PARTITIONS = re.compile(r'outer_dimension_partitions":\[([^\]]*)\]')
_OUTPUT_DIM = re.compile(r"dim_labels=\w+_(\w+)->")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a program.

    Attributes:
      name: of its instruction.
      kind: `matmul`, `convolution`, `collective`, `indexing`, `reduction`, `transpose` or `elementwise`.
      flops: of matrix products and convolutions.
      num_bytes: of its operands and results.
      computed: values computed one at a time: elements times the cheap operations of a fusion.
      costly: such values of functions that take many instructions, as `exp` does.
      products: matrix products of a batched one; 1 otherwise.
      rows, columns, depth: of a matrix product, results rows x columns; of a reduction along the fastest dim, rows is
        the number of results; 0 otherwise.
      split: whether the compiler for CPUs divides it among threads.
      library: whether it is a fusion that a library runs (YNNPACK, oneDNN) and not code made for it.
      times: how often one run of the program executes it.
    """

    name: str
    kind: str
    flops: float = 0.0
    num_bytes: int = 0
    computed: float = 0.0
    costly: float = 0.0
    products: int = 1
    rows: int = 0
    columns: int = 0
    depth: int = 0
    split: bool = False
    library: bool = False
    times: int = 1


def operations(hlo: str) -> list[Operation]:
    """Return what an optimized program, `compiled.as_text()`, executes."""
    program = parse(hlo)
    by_name = {each.name: each for instructions in program.computations.values() for each in instructions}
    times = turns(program)
    fused = _fused(program)
    found = []
    for name, count in times.items():
        if name in fused:
            continue
        for instruction in program.computations.get(name, ()):
            if instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
                made = _operation(instruction, program, by_name)
                found.append(dataclasses.replace(made, times=count))
    return found


def grouped(found: Sequence[Operation]) -> list[Operation]:
    """Return the operations without names, equal ones as one."""
    counts: dict[Operation, int] = {}
    for each in found:
        form = dataclasses.replace(each, name="", times=1)
        counts[form] = counts.get(form, 0) + each.times
    return [dataclasses.replace(form, times=count) for form, count in counts.items()]


def _fused(program: Program) -> set[str]:
    """Return the names of the computations that run as part of one instruction."""
    found: set[str] = set()
    for instructions in program.computations.values():
        for each in instructions:
            if each.opcode not in ("while", "conditional", "call"):
                found.update(each.called)
    return found


def _operation(instruction: Instruction, program: Program, by_name: Mapping[str, Instruction]) -> Operation:
    inside = _inside(instruction, program)
    results = sum(array.num_bytes for array in instruction.arrays)
    operands = sum(
        array.num_bytes for name in instruction.operands if name in by_name for array in by_name[name].arrays
    )
    kind = _kind(inside, by_name)
    if kind == INDEXING:  # only the rows that are named are read or written
        updates = [by_name[each.operands[1]] for each in inside if each.opcode == _UPDATE]
        if updates:
            results = sum(array.num_bytes for each in updates for array in each.arrays)
        operands = min(operands, results)
    partitions = _PARTITIONS.search(instruction.rest)
    made = Operation(
        instruction.name,
        kind,
        num_bytes=results + operands,
        computed=float(sum(_elements(each) for each in inside if each.opcode not in _MOVES | _COSTLY | {_UPDATE})),
        costly=float(sum(_elements(each) for each in inside if each.opcode in _COSTLY)),
        split=bool(partitions and partitions[1]),
        library="kind=kCustom" in instruction.rest,
    )
    for each in inside:
        if each.opcode == "dot":
            made = dataclasses.replace(made, **_of_dot(each, by_name), computed=0.0)
        elif each.opcode == "reduce" and _reduces_fastest(each, by_name):
            made = dataclasses.replace(made, rows=_elements(each))
        elif each.opcode == "convolution":
            made = dataclasses.replace(made, **_of_convolution(each, by_name), computed=0.0)
    return made


def _inside(instruction: Instruction, program: Program) -> Sequence[Instruction]:
    if instruction.opcode != "fusion":
        return [instruction]
    return [each for name in instruction.called for each in program.computations.get(name, ())]


def _kind(inside: Sequence[Instruction], by_name: Mapping[str, Instruction]) -> str:
    codes = {each.opcode.removesuffix("-start") for each in inside}
    if "dot" in codes:
        return MATMUL
    if "convolution" in codes:
        return CONVOLUTION
    if codes & set(_COLLECTIVES):
        return COLLECTIVE
    if codes & _INDEXED:
        return INDEXING
    if codes & {"reduce", "reduce-window", "select-and-scatter"}:
        return REDUCTION
    return TRANSPOSE if any(_transposes(each, by_name) for each in inside) else ELEMENTWISE


def _transposes(instruction: Instruction, by_name: Mapping[str, Instruction]) -> bool:
    """Return whether an instruction changes the order of elements in memory."""
    if instruction.opcode != "copy":
        return False
    source = by_name.get(instruction.operands[0])
    return source is not None and _order(source) != _order(instruction)


def _order(instruction: Instruction) -> list[int]:
    """Return the dims longer than 1, from the fastest in memory on."""
    order, dims = _MINOR_TO_MAJOR.search(instruction.shape), _dims(instruction)
    return [dim for dim in map(int, order[1].split(",")) if dims[dim] > 1] if order else []


def _dims(instruction: Instruction) -> list[int]:
    found = _DIMS.search(instruction.shape)
    return [int(length) for length in found[1].split(",") if length] if found else []


def _elements(instruction: Instruction) -> int:
    return math.prod(_dims(instruction))


def _of_dot(dot: Instruction, by_name: Mapping[str, Instruction]) -> dict[str, Any]:
    left = _dims(by_name[dot.operands[0]])
    contracted, batched = _dims_named(_CONTRACTED, dot), _dims_named(_BATCHED, dot)
    depth, products = math.prod(left[dim] for dim in contracted), math.prod(left[dim] for dim in batched)
    rows = math.prod(left) // max(depth * products, 1)
    columns = _elements(dot) // max(rows * products, 1)
    flops = 2.0 * _elements(dot) * depth
    return {"flops": flops, "products": products, "rows": rows, "columns": columns, "depth": depth}


def _reduces_fastest(reduction: Instruction, by_name: Mapping[str, Instruction]) -> bool:
    order = _order(by_name[reduction.operands[0]])
    return bool(order) and order[0] in _dims_named(_REDUCED, reduction)


def _dims_named(pattern: re.Pattern[str], instruction: Instruction) -> list[int]:
    found = pattern.search(instruction.rest)
    return [int(dim) for dim in found[1].split(",") if dim] if found else []


def _of_convolution(convolution: Instruction, by_name: Mapping[str, Instruction]) -> dict[str, Any]:
    kernel = _dims(by_name[convolution.operands[1]])
    labels = _OUTPUT_DIM.search(convolution.rest)
    columns = max(kernel[labels[1].index("o")] if labels else 1, 1)
    rows, depth = _elements(convolution) // columns, math.prod(kernel) // columns
    return {"flops": 2.0 * _elements(convolution) * depth, "rows": rows, "columns": columns, "depth": depth}
