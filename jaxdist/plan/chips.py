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
      link_bytes_per_second: that one device can send, over all its links to devices near it.
      dims: of the torus that the devices form.
      source: where the figures are from.
      host_devices: number of devices that those links connect; None where they connect all.
      far_bytes_per_second: that one device can send to devices beyond those; None where there are none beyond.
    """

    name: str
    memory_bytes: int | None
    flops_per_second: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    dims: int
    source: str
    host_devices: int | None = None
    far_bytes_per_second: float | None = None

    def bytes_per_second(self, devices: tuple[int, ...]) -> float:
        """Return what each device can send in a ring over `devices`, numbers of devices that are numbered by host."""
        if self.host_devices is None or len({each // self.host_devices for each in devices}) <= 1:
            return self.link_bytes_per_second
        return self.far_bytes_per_second or self.link_bytes_per_second


_GOOGLE = "Google Cloud TPU documentation, system architecture pages"

TPUS = {
    "v4": Chip("v4", 32 << 30, 275e12, 1228e9, 300e9, 3, _GOOGLE),
    "v5e": Chip("v5e", 16 << 30, 197e12, 819e9, 200e9, 2, _GOOGLE),
    "v5p": Chip("v5p", 95 << 30, 459e12, 2765e9, 600e9, 3, _GOOGLE),
    "v6e": Chip("v6e", 32 << 30, 918e12, 1640e9, 448e9, 2, _GOOGLE),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU: its figures, and what the compiler wants to know of it.

    Attributes:
      chip: memory, arithmetic and links; NVLink in one direction, and one network card a GPU between hosts of 8.
      title: the name the driver gives it.
      capability: CUDA compute capability.
      cores: streaming multiprocessors.
      lanes: float32 units of one of them.
      clock_ghz: boost clock.
      shared_memory: bytes of one core.
      cache_bytes: of the second-level cache.
    """

    chip: Chip
    title: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    clock_ghz: float
    shared_memory: int
    cache_bytes: int

    def target_config(self) -> str:
        """Return XLA's description of the GPU, a protocol buffer in text form (`GpuTargetConfigProto`)."""
        chip, (major, minor) = self.chip, self.capability
        device = {
            "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048,
            "shared_memory_per_block": 49152, "shared_memory_per_core": self.shared_memory,
            "shared_memory_per_block_optin": self.shared_memory - 1024,
            "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
            "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
            "core_count": self.cores, "fpus_per_core": self.lanes, "clock_rate_ghz": self.clock_ghz,
            "memory_bandwidth": int(chip.memory_bytes_per_second), "device_memory_size": chip.memory_bytes,
            "l2_cache_size": self.cache_bytes,
        }  # fmt: skip
        fields = " ".join(f"{name}: {value}" for name, value in device.items())
        capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
        return (
            f"gpu_device_info {{ {fields} {capability} }} "
            f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{self.title}"'
        )


def _nvidia(name: str, memory: int, flops: float, bandwidth: float, link: float, far: float, source: str) -> Chip:
    return Chip(name, memory, flops, bandwidth, link, 1, source, HOST_GPUS, far)


HOST_GPUS = 8
_SHEET = "NVIDIA data sheet"
GPUS = {
    "a100": Gpu(
        _nvidia("a100", 80 << 30, 312e12, 2039e9, 300e9, 25e9, f"{_SHEET}, A100 80GB SXM, DGX A100"),
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 167936, 40 << 20,
    ),
    "h100": Gpu(
        _nvidia("h100", 80 << 30, 989e12, 3350e9, 450e9, 50e9, f"{_SHEET}, H100 SXM, DGX H100"),
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 233472, 50 << 20,
    ),
    "h200": Gpu(
        _nvidia("h200", 139 << 30, 989e12, 4800e9, 450e9, 50e9, f"{_SHEET}, H200 SXM, DGX H200"),
        "NVIDIA H200", (9, 0), 132, 128, 1.98, 233472, 50 << 20,
    ),
    "b200": Gpu(
        _nvidia("b200", 180 << 30, 2250e12, 8000e9, 900e9, 50e9, f"{_SHEET}, B200, DGX B200"),
        "NVIDIA B200", (10, 0), 148, 128, 1.965, 233472, 126 << 20,
    ),
}  # fmt: skip
