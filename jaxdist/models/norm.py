"""Batch normalisation that leaves padding rows out of its statistics, with the defaults our models share."""

import flax.linen as nn
import jax
from jax.nn import initializers


class BatchNorm(nn.Module):
    """Normalise over batch and spatial dims with this call's statistics in training, the running ones in evaluation.

    The statistics belong to the rows of one call: under data parallelism each device (or logical shard) normalises its
    own rows, as in Ioffe and Szegedy, 2015, and in torch's DistributedDataParallel.
    """

    momentum: float = 0.9
    """Share of the running statistics that one step keeps."""
    scale_init: initializers.Initializer = initializers.ones
    """Initialiser of the scale; zeros makes a residual block start as the identity."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Return `x` normalised, same shape (B, ..., C) and dtype; `mask` (B,) is true for the rows that count.

        At least one row must be true: the mean over none is NaN (`jaxdist.adapters` sees to it).
        """
        if mask is not None:
            mask = mask.reshape(mask.shape + (1,) * (x.ndim - 1))
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=self.momentum, scale_init=self.scale_init, name="norm"
        )
        return norm(x, mask=mask)
