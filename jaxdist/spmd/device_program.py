"""One compiled single-device program that runs on every device of a mesh, the same machine code on each.

`jax.jit` makes a different program for every number of devices: XLA partitions, simplifies, fuses and parallelises
each differently. Here a function is compiled once, for one device, and its serialized form is loaded as replicas that
run side by side, one on each device (what `pmap` does, without the collectives). Canonical reduction depends on it: the
program is not just equivalent but the same. Loading takes milliseconds, and one call dispatches all replicas.

A program in which the devices `exchange` values is compiled for their number. What is to have the same bits for every
number is then computed `by_itself`.

In a job process 0 traces and lowers a program, which takes longer than to load it, and tells the others what came out.
So all run the very same program, and where they share processors the job starts sooner. Process 0 of the next attempt
takes over what was told of the step: after a crash the job runs the programs that it ran before.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxdist.spmd import jax_private

PyTree: TypeAlias = Any
Found = TypeVar("Found")

_SMALL_SIZE = 1 << 18
"""Elements below which several threads are no help."""
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_WAIT_SECONDS = 60.0
"""How long to wait for what process 0 finds out; after that a process finds it out by itself."""
_MOST_TOLD_BYTES = 1 << 21
_LEAF = jax.tree.structure(0)


class PerDeviceProgram:
    """`function`, run by each device of `mesh` on its part of the arguments.

    Called with trees of global arrays laid out by `in_specs`: `PartitionSpec()` for what every device holds whole,
    `PartitionSpec(axis)` for what is sharded in the leading dim. Returns global arrays in the same way. A replicated
    result must be the same on every device: computed from replicated arguments, or from what all have exchanged. One in
    shards is for programs and for `addressable_shards`: `np.asarray` of it as a whole raises on jax 0.12, whose runtime
    takes the part of a replica for the whole array ("Shape mismatch during ToLiteral").
    Compiled at the first call, for its shapes.

    The function is traced once. There is one of `in_specs` for each argument, for all its leaves; the result may take
    the memory of `donate_argnums`. `exchanges` is whether the function calls `exchange`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        mesh: Mesh,
        *,
        in_specs: tuple[PartitionSpec, ...],
        out_spec: PartitionSpec,
        donate_argnums: tuple[int, ...] = (),
        exchanges: bool = False,
    ):
        # keep_unused, so that the compiled program's arguments are the leaves of ours, one by one.
        self._function = jax.jit(function, donate_argnums=donate_argnums, keep_unused=True)
        self._name, self._donated = getattr(function, "__qualname__", str(type(function))), donate_argnums
        self._mesh, self._in_specs, self._out_spec, self._exchanges = mesh, in_specs, out_spec, exchanges
        self._program: jax.stages.Compiled | None = None

    def __call__(self, *args: PyTree) -> Any:
        """Return the result's global arrays, dispatched and not waited for."""
        if self._program is None:
            self._program = self._compile(args)
        return self._program(*args)

    @property
    def num_compiles(self) -> int:
        """How often it was compiled: at most once, because it refuses arguments of other shapes."""
        return int(self._program is not None)

    def trace(self, *args: PyTree) -> jax.stages.Traced:
        """Return the function traced for what one device has, arrays of these shapes; compiles nothing."""
        device = self._mesh.local_devices[0]
        return self._function.trace(*jax.tree.map(lambda leaf: _of_device(leaf, leaf.shape, device), args))

    def _compile(self, args: tuple[PyTree, ...]) -> jax.stages.Compiled:
        shardings = [
            NamedSharding(self._mesh, spec)
            for spec, arg in zip(self._in_specs, args, strict=True)
            for _ in jax.tree.leaves(arg)
        ]
        leaves, structure = jax.tree.flatten(args)
        device, devices = self._mesh.local_devices[0], list(self._mesh.devices.flat)
        local = [_local(leaf, sharding, device) for leaf, sharding in zip(leaves, shardings, strict=True)]
        local_args = jax.tree.unflatten(structure, local)
        shapes = [(leaf.shape, str(leaf.dtype), leaf.weak_type) for leaf in local]
        lowered = told_by_first(
            json.dumps([self._name, shapes, str(self._in_specs), str(self._out_spec)]),
            lambda: _Lowered.of(self._function.lower(*local_args)),
            self._mesh,
            write=lambda found: found.to_bytes(local_args),
            read=lambda content: _Lowered.from_bytes(content, local_args),
        )
        mesh_executable = jax_private.mesh_executable(
            _load(lowered, devices if self._exchanges else [device], devices),
            self._mesh,
            [_global_aval(leaf, sharding) for leaf, sharding in zip(local, shardings, strict=True)],
            shardings,
            [_global_aval(leaf, NamedSharding(self._mesh, self._out_spec)) for leaf in lowered.results],
            [NamedSharding(self._mesh, self._out_spec)] * len(lowered.results),
            lowered.python,
        )
        info = tuple(
            jax.tree.map(lambda leaf, donated=number in self._donated: _argument(leaf, donated), arg)
            for number, arg in enumerate(local_args)
        )
        return jax.stages.Compiled(mesh_executable, [], (info, {}), lowered.structure, no_kwargs=True)


class _Lowered(NamedTuple):
    """A program that is traced and lowered: its module, and the leaves and the structure of its result.

    Another process cannot load one that uses `python` of this one.
    """

    module: Any
    results: Sequence[jax.ShapeDtypeStruct]
    structure: Any
    python: jax_private.Python = jax_private.NO_PYTHON

    @classmethod
    def of(cls, lowered: jax.stages.Lowered) -> "_Lowered":
        results, structure = jax.tree.flatten(lowered.out_info)
        return cls(lowered.compiler_ir(), results, structure, jax_private.python_of(lowered))

    def to_bytes(self, args: tuple[PyTree, ...]) -> bytes | None:
        """Return the program for the other processes, None if they have to trace it by themselves.

        Of the structure of the result only tuples, lists and dicts are written; other parts must be structured as an
        argument is, for example the new state.
        """
        described = None if any(self.python) else _described(self.structure, args)
        if described is None:
            return None
        results = [(leaf.shape, str(leaf.dtype), bool(leaf.weak_type)) for leaf in self.results]
        return json.dumps([described, results]).encode() + b"\n" + jax_private.module_bytes(self.module)

    @classmethod
    def from_bytes(cls, content: bytes, args: tuple[PyTree, ...]) -> "_Lowered":
        head, _, module = content.partition(b"\n")
        described, found = json.loads(head)
        results = [jax.ShapeDtypeStruct(tuple(shape), dtype, weak_type=weak) for shape, dtype, weak in found]
        return cls(jax_private.module_of(module), results, jax.tree.structure(_built(described, args)))


def _described(structure: Any, args: tuple[PyTree, ...]) -> Any:
    """Return JSON for a structure: the number of an argument with this structure, or kind and parts; None for others.

    A leaf is an empty list. See `_built`.
    """
    if structure == _LEAF:
        return []
    same = [number for number, arg in enumerate(args) if jax.tree.structure(arg) == structure]
    if same:
        return same[0]
    kind, names = structure.node_data() or (None, None)
    parts = [_described(child, args) for child in structure.children()]
    if None in parts:
        return None
    if kind is dict and names is not None and all(isinstance(name, str) for name in names):
        return ["dict", dict(zip(names, parts, strict=True))]
    return [kind.__name__, parts] if kind in (tuple, list) else None


def _built(described: Any, args: tuple[PyTree, ...]) -> PyTree:
    """Return a tree of the structure that `_described` has described."""
    if described == []:
        return 0
    if isinstance(described, int):
        return args[described]
    kind, parts = described
    if kind == "dict":
        return {name: _built(part, args) for name, part in parts.items()}
    return {"tuple": tuple, "list": list}[kind](_built(part, args) for part in parts)


def told_by_first(
    name: str,
    find: Callable[[], Found],
    mesh: Mesh,
    *,
    write: Callable[[Found], bytes | None],
    read: Callable[[bytes], Found],
) -> Found:
    """Return what process 0 of a job has found out, and told by the coordinator's store; find it without a job.

    All processes of the mesh call this in the same order for each name. The others find it by themselves where it
    cannot be written (None), is large, or does not come in time, for example because process 0 has raised an error.
    """
    client, (process, count) = jax_private.coordinator_store(), jax_private.process_of_job()
    if client is None or count == 1 or not _spans(mesh, count):
        return find()
    hashed_name = hashlib.sha256(name.encode()).hexdigest()
    key = f"jaxdist/found/{hashed_name}/{next(_numbers(hashed_name))}"
    if not process and (known := TOLD.known(key)) is not None:
        client.key_value_set_bytes(key, b"+" + known)
        return read(known)
    if process:
        try:
            told = client.blocking_key_value_get_bytes(key, int(1000 * _WAIT_SECONDS))
        except jax.errors.JaxRuntimeError:  # not in time, or the coordinator is gone
            told = b""
        return read(told[1:]) if told[:1] == b"+" else find()
    told = b"-"
    try:
        found = find()
        content = write(found)
        if content is not None and len(content) <= _MOST_TOLD_BYTES:
            TOLD.note(key, content)
            told = b"+" + content
    finally:
        client.key_value_set_bytes(key, told)
    return found


class Told:
    """What process 0 tells the others, kept for process 0 of the next attempt, which need not find it out again.

    Only what is asked for within `kept` is noted and used again, and only from `begin` on: of a function that is traced
    at other times too, or in another order, the name and the number would not say which program is meant.
    """

    def __init__(self) -> None:
        self._known: Mapping[str, bytes] | None = None
        self._told: dict[str, bytes] = {}
        self._is_kept = False

    def begin(self, known: Mapping[str, bytes]) -> None:
        """Use what an attempt before has told, for the same programs, and note what is new."""
        self._known, self._told = known, dict(known)

    def end(self) -> None:
        """Use and note nothing any more."""
        self._known, self._told = None, {}

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what is found out within this context."""
        before, self._is_kept = self._is_kept, True
        try:
            yield
        finally:
            self._is_kept = before

    def all(self) -> dict[str, bytes]:
        """Return what is known and noted, for `begin` of the next attempt."""
        return dict(self._told)

    def known(self, key: str) -> bytes | None:
        """Return what was told under this key before; None if it has to be found out."""
        return self._known.get(key) if self._known and self._is_kept else None

    def note(self, key: str, content: bytes) -> None:
        """Note what is told."""
        if self._known is not None and self._is_kept:
            self._told[key] = content


TOLD = Told()
"""That of this process, as it is of one job."""


def _spans(mesh: Mesh, num_processes: int) -> bool:
    """Return whether all processes of a job have devices in the mesh."""
    return len({device.process_index for device in mesh.devices.flat}) == num_processes


@functools.cache
def _numbers(name: str) -> Iterator[int]:
    """Return the numbers of what this process asks for by one name: a step that is made again has the same."""
    return itertools.count()


def by_itself(function: Callable[..., jax.Array], true: jax.Array, *args: Any) -> jax.Array:
    """Return `function(*args)`, compiled by itself: XLA fuses nothing into it and nothing out of it.

    So it has the bits of a program of its own, and the rest of the program is what it would be without: a barrier would
    not do, XLA removes it before it fuses. On CPU devices it is a call that XLA must not inline. Elsewhere it is a
    branch of a conditional, which is taken, and costs more: `true` is a value that XLA cannot know to be true.
    """
    return _apart(function, true, args, {"inlineable": "false"})


def hashed(function: Callable[..., jax.Array], true: jax.Array, vector: jax.Array) -> jax.Array:
    """Return `function(vector)`, whole numbers that stand for the bits of a vector, compiled by itself.

    A small vector is hashed by one kernel on CPU devices: XLA hands the kernels of a program to threads one by one,
    which takes longer than these compute. Only whole numbers keep their bits in it, and it must have one argument: with
    several, XLA's older emitter, which makes such kernels, has aborted the process.
    """
    is_small = vector.size < _SMALL_SIZE and vector.dtype == jnp.float32
    kernel = {"xla_cpu_small_call": "true"} if is_small else {}
    return _apart(function, true, (vector,), {"inlineable": "false", **kernel})


def _apart(
    function: Callable[..., jax.Array], true: jax.Array, args: tuple[Any, ...], attributes: dict[str, str]
) -> jax.Array:
    leaves, structure = jax.tree.flatten(args)
    traced = jax.make_jaxpr(lambda *leaves: function(*jax.tree.unflatten(structure, leaves)))(*leaves)
    found: jax.Array = _apart_p.bind(true, *leaves, traced=traced, attributes=tuple(attributes.items()))
    return found


def _lower_conditional(context: Any, *operands: Any, traced: ClosedJaxpr, attributes: Any) -> Any:
    del attributes
    (result,) = traced.out_avals

    def taken(true: jax.Array, *leaves: jax.Array) -> jax.Array:
        compute = jaxpr_as_fun(traced)
        found: jax.Array = jax.lax.cond(true, compute, lambda *_: [jnp.zeros(result.shape, result.dtype)], *leaves)[0]
        return found

    return mlir.lower_fun(taken, multiple_results=False)(context, *operands)


def _lower_call(context: Any, *operands: Any, traced: ClosedJaxpr, attributes: tuple[tuple[str, str], ...]) -> Any:
    compute = jax.jit(jaxpr_as_fun(traced))
    results: Any = mlir.lower_fun(lambda _, *leaves: compute(*leaves), multiple_results=True)(context, *operands)
    named: dict[str, ir.Attribute] = {name: ir.StringAttr.get(value) for name, value in attributes}
    results[0].owner.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get(named)
    return results


_apart_p = Primitive("apart")
_apart_p.def_abstract_eval(lambda *operands, traced, attributes: traced.out_avals[0])
mlir.register_lowering(_apart_p, _lower_conditional)
mlir.register_lowering(_apart_p, _lower_call, platform="cpu")


def exchange(value: jax.Array, pairs: Sequence[tuple[int, int]]) -> jax.Array:
    """Return, inside a `PerDeviceProgram` that exchanges, the value of the device that has this one as its target.

    `pairs` are (source, target), places in the mesh. It is `lax.ppermute` of programs that are not partitioned.
    """
    exchanged: jax.Array = _exchange_p.bind(value, pairs=tuple(pairs))
    return exchanged


def _lower_exchange(context: Any, value: Any, *, pairs: tuple[tuple[int, int], ...]) -> Any:
    del context
    table: Any = np.array(pairs, np.int64)
    return [stablehlo.CollectivePermuteOp(value, ir.DenseIntElementsAttr.get(table)).result]


_exchange_p = Primitive("exchange")
_exchange_p.def_abstract_eval(lambda value, *, pairs: value)
mlir.register_lowering(_exchange_p, _lower_exchange)


def waits(mesh: Mesh) -> bool:
    """Return whether programs of single devices must not be in flight together with programs that have collectives.

    On CPU devices a one-device program computes in XLA's thread pool, and a collective keeps its thread of that pool
    while it waits for the other devices: they could block each other.
    """
    return mesh.size > 1 and bool(mesh.devices.flat[0].platform == "cpu")


def settled(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return `tree`, computed where `waits`, otherwise dispatched."""
    return jax.block_until_ready(tree) if waits(mesh) else tree


def _local(leaf: jax.Array, sharding: NamedSharding, device: jax.Device) -> jax.ShapeDtypeStruct:
    return _of_device(leaf, sharding.shard_shape(leaf.shape), device)


def _of_device(leaf: Any, shape: tuple[int, ...], device: jax.Device) -> jax.ShapeDtypeStruct:
    weak_type = bool(jax.typeof(leaf).weak_type)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=SingleDeviceSharding(device), weak_type=weak_type)


def _global_aval(local: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.core.ShapedArray:
    parts = sharding.num_devices if tuple(sharding.spec) else 1
    shape = (local.shape[0] * parts, *local.shape[1:]) if parts > 1 else local.shape
    return jax.core.ShapedArray(shape, local.dtype, weak_type=bool(local.weak_type))


def _argument(leaf: jax.ShapeDtypeStruct, donated: bool) -> jax.stages.ArgInfo:
    return jax.stages.ArgInfo(jax.core.ShapedArray(leaf.shape, leaf.dtype, weak_type=bool(leaf.weak_type)), donated)


def _load(lowered: _Lowered, made_for: Sequence[jax.Device], devices: Sequence[jax.Device]) -> Any:
    """Return XLA's executable of a program with a replica on each of `devices`, made for all or for one of them.

    JAX's persistent cache is used under a key of our own, the same for all processes and any number of devices, and
    its bytes are loaded with our placement: an executable that JAX loaded from there cannot be serialized again
    (on CPU devices its kernels are lost; jaxlib 0.10 and 0.12).
    """
    callbacks = lowered.python.callbacks
    key = None if any(lowered.python) else jax_private.cache_key(lowered.module, made_for[0])
    if key is None:
        return _on_all(_compile(lowered.module, made_for, key, callbacks), made_for, devices, callbacks)
    cached = _read_cache(key, devices)
    if cached is not None:
        return cached
    with jax_private.turn_to_compile(key):
        return _read_cache(key, devices) or _on_all(_compile(lowered.module, made_for, key), made_for, devices)


def _on_all(
    compiled: Any, made_for: Sequence[jax.Device], devices: Sequence[jax.Device], callbacks: Sequence[Any] = ()
) -> Any:
    if len(devices) == len(made_for):
        return compiled
    return jax_private.load_executable(compiled.serialize(), devices, callbacks=callbacks)


def _compile(module: Any, devices: Sequence[jax.Device], key: str | None, callbacks: Sequence[Any] = ()) -> Any:
    """Compile `module` for `devices`, store the executable in the cache under `key`, and return it."""
    name = module.operation.attributes["sym_name"].value
    start = time.monotonic()
    compiled = jax_private.compile_module(module, devices, callbacks=callbacks)
    seconds = time.monotonic() - start
    jax.monitoring.record_event_duration_secs(_COMPILE_EVENT, seconds, fun_name=name)
    # Only what took long to compile, as JAX does.
    if key is not None and seconds >= jax.config.values["jax_persistent_cache_min_compile_time_secs"]:
        jax_private.write_cache(key, name, compiled, devices[0], seconds=seconds)
    return compiled


def _read_cache(key: str, devices: Sequence[jax.Device]) -> Any:
    try:
        return jax_private.read_cache(key, devices)
    except Exception as error:  # a damaged entry is whatever zstandard, zlib or XLA raise
        warnings.warn(f"An entry of the compilation cache cannot be read; compiling again: {error}", stacklevel=2)
        jax_private.remove_from_cache(key)
        return None
