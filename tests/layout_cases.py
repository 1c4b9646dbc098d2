"""Every layout of `small_problem`'s params, on any number of devices: tests compare them with one another."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxdist.spmd import layout as layouts
from jaxdist.spmd.mesh import make_mesh

P = PartitionSpec
COLUMN_THEN_ROW = [("first", P(None, "model")), ("second", P("model"))]
SHARDED_COLUMN_THEN_ROW = [("first", P("fsdp", "model")), ("second", P("model", "fsdp"))]


class Case(NamedTuple):
    """Mesh axes for a number of devices, and the layout on that mesh."""

    axes: Callable[[int], dict[str, int]]
    layout: Callable[[Mesh], layouts.Layout]

    def on(self, devices: Sequence[jax.Device]) -> tuple[Mesh, layouts.Layout, tuple[str, ...]]:
        """Return mesh, layout and the axes that the batch is sharded over."""
        mesh = make_mesh(self.axes(len(devices)), devices=devices)
        return mesh, self.layout(mesh), tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)


def split_in_two(inner: str) -> Callable[[int], dict[str, int]]:
    return lambda num_devices: {"data": min(2, num_devices), inner: -1}


CASES = {
    "replicated": Case(lambda _: {"data": -1}, lambda _: layouts.replicated),
    "zero1": Case(lambda _: {"data": -1}, lambda mesh: layouts.zero1(mesh, min_size=8)),
    "fsdp": Case(lambda _: {"data": -1}, lambda mesh: layouts.fsdp(mesh, min_size=8)),
    "hsdp": Case(split_in_two("fsdp"), lambda mesh: layouts.fsdp(mesh, axis="fsdp", min_size=8)),
    "zero1 in groups": Case(split_in_two("fsdp"), lambda mesh: layouts.zero1(mesh, axis="fsdp", min_size=8)),
    "tensor": Case(split_in_two("model"), lambda _: layouts.by_path(COLUMN_THEN_ROW)),
    "tensor alone": Case(lambda _: {"data": 1, "model": -1}, lambda _: layouts.by_path(COLUMN_THEN_ROW)),
    "tensor and fsdp": Case(
        lambda num_devices: {"data": -1, "fsdp": min(2, num_devices), "model": 2 if num_devices > 2 else 1},
        lambda _: layouts.by_path(SHARDED_COLUMN_THEN_ROW),
    ),
}
