"""Strategies by name: what spreads a model and its batch over the devices.

A strategy is a mesh, a layout and the builder of the step that goes with them. Nothing in a model or in its loss knows
which was chosen.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import optax
from jax.sharding import Mesh

from jaxdist import canonical, evaluate, layout, reduce
from jaxdist import step as steps
from jaxdist.mesh import DATA_AXIS, make_mesh

REDUCTIONS = ("mean", "canonical")

PURPOSES: Mapping[str, str] = {
    "data-parallel": "a whole replica on every device, gradients averaged; the simplest and fastest where it fits",
}
ELSEWHERE: Mapping[str, str] = {
    "parameter-server": "islands of devices that meet at a server, synchronously or not",
}
"""Strategies that are no layout of one mesh; the command line builds them otherwise."""


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A chosen way to spread training over devices.

    Attributes:
      name: what the user picked.
      mesh: the devices.
      layout: which part of each leaf of the state lies where; for `state.create_state`.
      batch_axes: mesh axes the batch is cut over; for the data feed and `mesh.batch_sizes`.
      logical_shards: number of fixed slices of the batch under canonical reduction, else None.
      step_builder: called by `make_step`.
    """

    name: str
    mesh: Mesh
    layout: layout.Layout
    batch_axes: tuple[str, ...]
    logical_shards: int | None
    step_builder: Callable[..., steps.Step]

    def make_step(
        self,
        loss_fn: reduce.LossFn,
        optimizer: optax.GradientTransformation,
        *,
        num_microbatches: int = 1,
    ) -> steps.Step:
        """Return `step(state, batch) -> (state, metrics)`; the state is donated."""
        return self.step_builder(loss_fn, optimizer, num_microbatches=num_microbatches)

    def make_eval_step(self, eval_fn: evaluate.EvalFn) -> evaluate.EvalStep:
        """Return the evaluation of one global batch, of the same reduction as the step."""
        if self.logical_shards is None:
            return evaluate.eval_step(eval_fn)
        return evaluate.canonical_eval_step(eval_fn, self.mesh, logical_shards=self.logical_shards)


def build(
    name: str,
    *,
    devices: Sequence[jax.Device] | None = None,
    mesh_axes: Mapping[str, int] | None = None,
    reduction: str = "mean",
    logical_shards: int = 8,
) -> Strategy:
    """Return the strategy called `name`.

    Args:
      name: one of `PURPOSES`.
      devices: the devices to use, all by default.
      mesh_axes: axis name -> size (one may be -1); None is the strategy's own default.
      reduction: how gradients are added up, `mean` or `canonical`.
      logical_shards: for canonical reduction, the number of fixed slices of the global batch.

    Raises:
      ValueError: there is no such strategy or reduction, or they do not go together.
    """
    check_name(name)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}.")
    return _data_parallel(make_mesh(mesh_axes, devices=devices), reduction, logical_shards)


def check_name(name: str) -> None:
    """Raise ValueError where `name` is no strategy of one mesh; the message says which exist and what each is for."""
    if name in PURPOSES:
        return
    known = "\n".join(f"  {each}: {purpose}" for each, purpose in {**PURPOSES, **ELSEWHERE}.items())
    if name in ELSEWHERE:
        raise ValueError(
            f"Strategy {name!r} is no layout of one mesh; it is started by `jaxdist train`, not built here."
        )
    raise ValueError(f"There is no strategy {name!r}. Choose one of\n{known}")


def _data_parallel(mesh: Mesh, reduction: str, logical_shards: int) -> Strategy:
    if reduction == "canonical":
        canonical.check_layout(mesh, logical_shards=logical_shards)

        def build_canonical(
            loss_fn: reduce.LossFn,
            optimizer: optax.GradientTransformation,
            *,
            num_microbatches: int,
        ) -> steps.Step:
            return steps.canonical_step(
                loss_fn,
                optimizer,
                mesh,
                logical_shards=logical_shards,
                num_microbatches=num_microbatches,
            )

        return Strategy("data-parallel", mesh, layout.replicated, (DATA_AXIS,), logical_shards, build_canonical)

    def build_mean(
        loss_fn: reduce.LossFn,
        optimizer: optax.GradientTransformation,
        *,
        num_microbatches: int,
    ) -> steps.Step:
        return steps.data_parallel_step(loss_fn, optimizer, mesh, num_microbatches=num_microbatches)

    return Strategy("data-parallel", mesh, layout.replicated, (DATA_AXIS,), None, build_mean)
