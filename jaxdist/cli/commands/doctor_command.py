"""`jaxdist doctor`: what is installed, what is visible, and likely problems, before a run or for a bug report."""

import argparse
import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence

import jax

from jaxdist.errors import ExitStatus
from jaxdist.launch.joining import runtime
from jaxdist.rundir import record

EXTRAS = {
    "completion": ("shtab",),
    "data": ("tensorflow_datasets", "array_record", "pyarrow", "PIL", "simplejpeg", "soundfile", "google_crc32c"),
    "examples": ("sklearn", "plotly"),
    "export": ("safetensors", "flatbuffers"),
    "mlflow": ("mlflow",),
    "paramserver": ("google_crc32c",),
    "ray": ("ray",),
    "remote": ("fsspec",),
    "report": ("plotly",),
    "text": ("sentencepiece", "tokenizers"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
LEAST_FREE_BYTES = 2 << 30


def doctor(options: argparse.Namespace) -> int:
    """Print what is installed and visible."""
    print(examine(runtime.start(options.devices or 8)))
    return ExitStatus.OK


def examine(devices: Sequence[jax.Device]) -> str:
    """Return a report on this machine as text: versions, devices, extras, and warnings."""
    lines = [f"{name:<12} {version or 'not installed'}" for name, version in record.versions().items()]
    lines += ["", f"{'platform':<12} {platform.platform()}", f"{'cores':<12} {_usable_cores()}"]
    lines.append(f"{'devices':<12} {len(devices)} x {devices[0].device_kind} ({devices[0].platform})")
    lines.append(f"{'cache':<12} {jax.config.values['jax_compilation_cache_dir'] or 'none'}")
    lines += ["", *(f"extra {name:<12} {_state_of(modules)}" for name, modules in EXTRAS.items())]
    warnings = list_warnings(devices)
    lines += ["", *(f"! {warning}" for warning in warnings)] if warnings else ["", "No problems found."]
    return "\n".join(lines)


def list_warnings(devices: Sequence[jax.Device]) -> list[str]:
    """Return what is likely to cause trouble on this machine, one sentence each."""
    warnings = []
    if devices[0].platform == "cpu" and _usable_cores() == 1:
        warnings.append(
            "One usable core: a script of your own needs PJRT_NPROC=8 in the environment for canonical reduction to "
            "give the bits of other machines (`jaxdist train` sets it)."
        )
    if devices[0].platform != "cpu":
        warnings.append(
            "The bits of canonical reduction belong to one kind of device; on GPUs, set "
            "XLA_FLAGS=--xla_gpu_deterministic_ops=true."
        )
    free = shutil.disk_usage(os.getcwd()).free
    if free < LEAST_FREE_BYTES:
        warnings.append(f"Only {free / 2**30:.1f} GiB are free here; checkpoints and run directories need room.")
    if "--xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        warnings.append("XLA_FLAGS sets the number of fake CPU devices; --devices does that, and the two may clash.")
    return warnings


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _state_of(modules: Sequence[str]) -> str:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"lacks {', '.join(missing)}" if missing else "installed"
