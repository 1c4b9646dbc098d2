"""Losses in which an example's value depends on other examples of the batch, such as contrastive losses."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxdist.losses.targets import Values
from jaxdist.spmd.metrics import Batch


@dataclasses.dataclass(frozen=True)
class WholeBatch:
    """A loss that sees the outputs and fields of the global batch, on any number of devices.

    A loss is called with the examples of one device. Where the examples of a batch are compared with each other (CLIP,
    SimCLR, in-batch negatives), that gives other numbers than one device would. This one gathers outputs and batch from
    all devices, and keeps the values of a device's own examples; gradients flow back to the device that made an output.
    Each device holds the outputs of all, as in the all-gather of CLIP (Radford et al. 2021).
    """

    loss: Callable[[Any, Batch], tuple[Values, dict[str, Values]]]
    """`loss(outputs, batch) -> (values, metrics)`, with a value for each example. Rows of padding are in the batch,
    too: what compares examples leaves out those whose `batch["mask"]` is 0."""

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Values, dict[str, Values]]:
        """Return the values of this device's examples.

        Raises:
          ValueError: the loss or a metric is not a value for each example.
        """
        axes = jax.sharding.get_abstract_mesh().manual_axes
        if not axes:
            return self.loss(outputs, batch)
        gathered = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axes, tiled=True), (outputs, dict(batch)))
        rows = jax.tree.leaves(outputs)[0].shape[0]
        first = jax.lax.axis_index(axes) * rows

        def own(values: jax.Array) -> jax.Array:
            if not values.ndim:  # each device would add the mean of all, and one with nothing but padding none
                raise ValueError(
                    "losses.WholeBatch takes a loss that returns a value for each example, also as metrics; got the "
                    "mean of a batch. Return the values before averaging."
                )
            return jax.lax.dynamic_slice_in_dim(values, first, rows)

        return jax.tree.map(own, self.loss(*gathered))
