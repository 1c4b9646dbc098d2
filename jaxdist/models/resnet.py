"""Residual networks (He et al., 2016), in Linen because their frozen fields can be overridden (`--set model.width=64`).

The stride of a bottleneck block stands at its 3x3 convolution, as in torchvision ("ResNet v1.5"), and the last
normalisation of a block starts at scale zero, so that each block starts as the identity (Goyal et al., 2017).
"""

import flax.linen as nn
import jax
from jax.nn import initializers
from jax.nn.initializers import Initializer

from jaxdist.models import sizes
from jaxdist.models.norm import BatchNorm

EXPANSION = {"basic": 1, "bottleneck": 4}
"""Channels that leave a block of each kind, as a multiple of its width."""

_conv_init = initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


class Block(nn.Module):
    """A residual block: basic (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1), with a projection where the shape changes."""

    kind: str
    """`basic` or `bottleneck`."""
    width: int
    """Channels inside the block."""
    stride: int
    """Stride of the block in height and width."""
    train: bool
    """Whether this call trains; a field, because a rematerialised call traces its arguments."""
    symmetric_padding: bool = False
    """Pad a strided convolution by the same number of pixels on all sides."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Return (B, H / stride, W / stride, width * expansion) for `x` (B, H, W, C); `mask` (B,) as in BatchNorm."""
        out_features = self.width * EXPANSION[self.kind]

        def conv_norm(
            x: jax.Array, features: int, size: int, stride: int, name: str, scale_init: Initializer = initializers.ones
        ) -> jax.Array:
            padding = _padding(size, symmetric=self.symmetric_padding)
            conv = nn.Conv(
                features,
                (size, size),
                (stride, stride),
                padding,
                use_bias=False,
                kernel_init=_conv_init,
                name=f"{name}_conv",
            )
            return BatchNorm(scale_init=scale_init, name=f"{name}_norm")(conv(x), train=self.train, mask=mask)

        shortcut = x
        if x.shape[-1] != out_features or self.stride != 1:
            shortcut = conv_norm(x, out_features, 1, self.stride, "shortcut")
        if self.kind == "basic":
            x = nn.relu(conv_norm(x, self.width, 3, self.stride, "first"))
        else:
            x = nn.relu(conv_norm(x, self.width, 1, 1, "first"))
            x = nn.relu(conv_norm(x, self.width, 3, self.stride, "middle"))
        size = 3 if self.kind == "basic" else 1
        x = conv_norm(x, out_features, size, 1, "last", initializers.zeros)
        return nn.relu(shortcut + x)


def _padding(size: int, *, symmetric: bool) -> str | list[tuple[int, int]]:
    """Return the padding of a convolution or pool of this size that keeps the shape at stride 1.

    At stride 2, SAME pads an even image by one pixel less before than after it; torch pads by as many.
    """
    return [((size - 1) // 2, (size - 1) // 2)] * 2 if symmetric else "SAME"


class ResNet(nn.Module):
    """A stem, stages of residual blocks that halve the image and double the channels, mean over space, logits."""

    num_classes: int
    """Number of logits."""
    stage_sizes: tuple[int, ...]
    """Number of blocks in each stage."""
    block: str = "basic"
    """Kind of block: `basic` (two 3x3) or `bottleneck` (1x1, 3x3, 1x1 to four times the channels)."""
    width: int = 64
    """Channels of the stem and inside the blocks of the first stage."""
    small_images: bool = False
    """Take the stem for images of about 32x32: one 3x3 convolution, in place of 7x7 with stride 2 and a max pool."""
    remat: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them."""
    symmetric_padding: bool = False
    """Pad strided convolutions and the pool as torch does, which its weights need: as many pixels on all sides."""

    def __post_init__(self) -> None:
        sizes.check(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Return logits (B, num_classes) for images (B, H, W, C); `mask` (B,) is true for rows that are not padding."""
        if self.block not in EXPANSION:
            raise ValueError(f"ResNet's block must be one of {sorted(EXPANSION)}, but got {self.block!r}.")
        size, stride = (3, 1) if self.small_images else (7, 2)
        x = nn.Conv(
            self.width,
            (size, size),
            (stride, stride),
            _padding(size, symmetric=self.symmetric_padding),
            use_bias=False,
            kernel_init=_conv_init,
            name="stem_conv",
        )(image)
        x = nn.relu(BatchNorm(name="stem_norm")(x, train=train, mask=mask))
        if not self.small_images:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=_padding(3, symmetric=self.symmetric_padding))
        block_type = nn.remat(Block) if self.remat else Block
        for stage, num_blocks in enumerate(self.stage_sizes):
            for index in range(num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                # An explicit name: with and without remat the params are the same tree.
                name = f"stage_{stage}_block_{index}"
                settings = (self.block, self.width * 2**stage, stride, train, self.symmetric_padding)
                x = block_type(*settings, name=name)(x, mask)
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


def resnet18(num_classes: int = 1000, *, remat: bool = False) -> ResNet:
    """Return ResNet-18: 11,689,512 parameters with 1000 classes."""
    return ResNet(num_classes, (2, 2, 2, 2), "basic", remat=remat)


def resnet50(num_classes: int = 1000, *, remat: bool = False) -> ResNet:
    """Return ResNet-50: 25,557,032 parameters with 1000 classes."""
    return ResNet(num_classes, (3, 4, 6, 3), "bottleneck", remat=remat)
