"""How much of the devices a run uses: examples and tokens a second on each, and FLOPs beside the peak of the chip.

Model FLOPs utilization is what Chowdhery et al. (2022, PaLM) define: FLOPs of a step x steps a second / (devices x peak
FLOPs a second of a device). FLOPs are those of matrix products and convolutions in the traced step. With `remat` they
include what the backward pass computes again; the figure is then that of the hardware.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.run import components
from jaxdist.run.diagnosis import flops

PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA B200": 2250e12,
}
"""Peak FLOPs a second of devices, dense bfloat16, by their kind as JAX names it, from their makers' data sheets.

NVIDIA's figures are without sparsity. `plan.chips` knows more of some of them.
"""


def throughput(
    *,
    examples_per_second: float | None,
    global_batch_size: int,
    num_devices: int,
    tokens_per_example: int | None,
    flops_per_step: float | None,
    peak: float | None,
) -> dict[str, float | None]:
    """Return the figures of one device, None for each that is not known.

    Examples and FLOPs are given over all devices, `peak`, in FLOPs a second, of one. `tokens_per_example` is None where
    the examples are no tokens.
    """
    each = None if examples_per_second is None else examples_per_second / num_devices
    known = each is not None and flops_per_step is not None and peak is not None
    return {
        "examples_per_second_per_device": each,
        "tokens_per_second_per_device": each and tokens_per_example and each * tokens_per_example,
        "flops_per_step": flops_per_step,
        "peak_flops_per_second": peak,
        "model_flops_utilization": flops_per_step / global_batch_size * each / peak if known else None,  # type: ignore[operator]
    }


def tokens_per_example(fields: Mapping[str, Any], inputs: str | tuple[str, ...]) -> int | None:
    """Return the length of a row of tokens: of the first input that is whole numbers in two dims, padding included."""
    for name in (inputs,) if isinstance(inputs, str) else inputs:
        field = fields.get(name)
        if field is not None and len(field.shape) == 2 and jnp.issubdtype(field.dtype, jnp.integer):
            return int(field.shape[1])
    return None


def peak_of(device: jax.Device) -> float | None:
    """Return the peak FLOPs a second of a device, dense bfloat16; None where its kind is not known, as for CPUs."""
    return PEAKS.get(device.device_kind)


def batch_of(parts: components.Parts) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a global batch as shapes, sharded as the step expects it."""
    rows = NamedSharding(parts.strategy.mesh, PartitionSpec(parts.strategy.batch_axes))
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows) for name, leaf in parts.fields.items()}


def flops_of(parts: components.Parts) -> float | None:
    """Return the FLOPs of a training step over all devices; None for a step that is several programs (canonical).

    A step that was traced for these shapes is not traced again.
    """
    trace = getattr(parts.step, "trace", None)
    if trace is None or parts.experiment.reduction == "canonical":
        return None
    return flops.count(trace(parts.abstract_state, batch_of(parts)).jaxpr)
