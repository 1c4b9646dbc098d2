"""Everything a plan reads off a compiled program, and the cache of it: compiling takes minutes, reading takes none.

A file of the cache is named by the SHA-256 of what was compiled: the program before optimization with its source lines,
the devices it is for, and the versions of the compiler.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib

from jaxdist.errors import UserError
from jaxdist.plan.compiled import collectives, live_buffers, operations
from jaxdist.rundir import files

NUM_BUFFERS = 10
_FORMAT = 4
"""Part of every name: another number makes the older files unused."""


class UnreadableProgramError(UserError):
    """A program that the compiler made and cannot print."""


class TooLargeError(UserError):
    """A program that the compiler did not make, since no device could hold what it needs."""


@dataclasses.dataclass(frozen=True)
class ProgramFacts:
    """What was read off a compiled program; bytes are those of one device.

    Attributes:
      argument_bytes: of all arguments.
      output_bytes: of results that are not in the memory of an argument.
      temp_bytes: of everything in between at the peak, as the compiler packed it.
      code_bytes: of the program itself.
      collectives: what it sends.
      operations: what it executes, equal ones as one.
      buffers: the largest arrays in memory at the peak.
      optimal_seconds: the compiler's own estimate of the time; None where it gives none.
    """

    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    code_bytes: int
    collectives: Sequence[collectives.Collective]
    operations: Sequence[operations.Operation]
    buffers: Sequence[live_buffers.Buffer]
    optimal_seconds: float | None


def of_lowered(lowered: Any, devices: Sequence[jax.Device], topology: str) -> ProgramFacts:
    """Return the facts of a lowered program, compiled for `devices` unless the cache has them."""
    path = cache_folder() / f"{_key(lowered, devices, topology)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return _from_json(json.loads(path.read_text(encoding="utf-8")))
    facts = read(_compiled(lowered, topology))
    with contextlib.suppress(OSError):  # A cache that cannot be written costs time, nothing else.
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, [json.dumps(dataclasses.asdict(facts)).encode()])
    return facts


def _compiled(lowered: Any, topology: str) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # The TPU compiler gives no program that its chip's memory does not hold.
        raise TooLargeError(
            f"The step does not fit a device of {topology}: {str(error).splitlines()[0]} Use more or larger devices, "
            "sharding, remat or more microbatches; --search tries them."
        ) from error


def read(compiled: jax.stages.Compiled) -> ProgramFacts:
    """Return the facts of a compiled program.

    Raises:
      UnreadableProgramError: JAX cannot print it.
    """
    memory: Any = compiled.memory_analysis()
    try:
        hlo = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        # XLA checks a program before it prints it, and does not know all that its TPU compiler makes of large rings.
        raise UnreadableProgramError(
            f"The program was compiled, but this version of JAX cannot print it: {str(error).splitlines()[0]}. Plan on "
            "fewer devices; --sweep-devices extrapolates from them."
        ) from error
    # The TPU compiler's estimate of a program with asynchronous copies may be negative; that is none.
    optimal = (compiled.cost_analysis() or {}).get("optimal_seconds", 0.0)
    return ProgramFacts(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        collectives=collectives.collectives(hlo),
        operations=operations.grouped(operations.operations(hlo)),
        buffers=live_buffers.at_peak(hlo)[:NUM_BUFFERS],
        optimal_seconds=optimal if optimal > 0 else None,
    )


def cache_folder() -> pathlib.Path:
    """Return the folder of the cache, beside that of compiled programs."""
    return files.cache_folder() / "plans"


def _key(lowered: Any, devices: Sequence[jax.Device], topology: str) -> str:
    content = hashlib.sha256(lowered.as_text(debug_info=True).encode())
    for part in (_FORMAT, topology, len(devices), devices[0].device_kind, jax.__version__, jaxlib.__version__):
        content.update(f"\0{part}".encode())
    content.update(os.environ.get("XLA_FLAGS", "").encode())
    return content.hexdigest()


def _from_json(content: dict[str, Any]) -> ProgramFacts:
    sent = [collectives.Collective(**each | {"devices": tuple(each["devices"])}) for each in content.pop("collectives")]
    buffers = [live_buffers.Buffer(**each) for each in content.pop("buffers")]
    done = [operations.Operation(**each) for each in content.pop("operations")]
    return ProgramFacts(**content, collectives=sent, operations=done, buffers=buffers)
