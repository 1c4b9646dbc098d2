"""Chips as numbers: memory, arithmetic and links, from their makers' data sheets.

A figure here is a peak, which no program reaches: what follows from it is a lower bound of the time.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can hold and do.

    Attributes:
      name: as users write it in a topology.
      memory_bytes: of one device; None where devices share the machine's memory.
      flops_per_second: peak, dense bfloat16.
      memory_bytes_per_second: between the device and its memory.
      link_bytes_per_second: that one device can send, over all its links.
      dims: of the torus that the devices form.
      source: where the figures are from.
    """

    name: str
    memory_bytes: int | None
    flops_per_second: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    dims: int
    source: str


_GOOGLE = "Google Cloud TPU documentation, system architecture pages"

TPUS = {
    "v4": Chip("v4", 32 << 30, 275e12, 1228e9, 300e9, 3, _GOOGLE),
    "v5e": Chip("v5e", 16 << 30, 197e12, 819e9, 200e9, 2, _GOOGLE),
    "v5p": Chip("v5p", 95 << 30, 459e12, 2765e9, 600e9, 3, _GOOGLE),
    "v6e": Chip("v6e", 32 << 30, 918e12, 1640e9, 448e9, 2, _GOOGLE),
}
