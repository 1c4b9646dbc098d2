"""The settings of an experiment by themselves: numbers that are too small, and settings that contradict each other."""

import functools
from typing import Any

import jax

from jaxdist import adapters, setting_group
from jaxdist.config.experiment import Experiment
from jaxdist.errors import ConfigError

_LEAST = {
    "global_batch_size": 1,
    "num_microbatches": 1,
    "logical_shards": 1,
    "log_every": 1,
    "eval.every_steps": 1,
    "eval.every_epochs": 1,
    "checkpoints.every_steps": 1,
    "checkpoints.keep_last": 1,
    "checkpoints.keep_every": 1,
    "guards.check_replicas_every": 0,
    "guards.audit_every": 0,
    "layout.min_size": 0,
    "recovery.snapshot_every": 0,
    "recovery.max_fruitless": 1,
    "recovery.min_processes": 1,
    "data.prefetch": 1,
    "data.num_threads": 0,
}
"""The least value of each counting setting; None is always allowed where the type allows it."""


def check_settings(experiment: Experiment) -> None:
    """Raise ConfigError where settings make no sense, or contradict each other, whatever the devices."""
    for name, least in _LEAST.items():
        value: Any = functools.reduce(getattr, name.split("."), experiment)
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}; got {value}.")
    for name in ("hang_seconds", "slow_seconds", "deadline_seconds"):
        value = getattr(experiment.recovery, name)
        if value is not None and not value > 0:  # NaN, too
            raise ConfigError(f"recovery.{name} must be positive; got {value}.")
    if not experiment.recovery.patience_seconds >= 0:
        raise ConfigError(
            f"recovery.patience_seconds must not be negative; got {experiment.recovery.patience_seconds}."
        )
    if experiment.reduction == "canonical" and jax.config.values.get("jax_disable_jit"):
        raise ConfigError(
            "The bits of reduction=canonical are those of compiled programs, and jax_disable_jit compiles none. Unset "
            "it (JAX_DISABLE_JIT=0), or use --reduction mean."
        )
    if experiment.guards.audit_every and not (experiment.reduction == "canonical" and experiment.guards.step_hashes):
        raise ConfigError(
            "An audit compares bits, which all devices have in common under reduction=canonical, and the hashes of "
            f"steps; got guards.audit_every={experiment.guards.audit_every} with reduction={experiment.reduction} and "
            f"guards.step_hashes={experiment.guards.step_hashes}. Set both, or guards.audit_every=0."
        )
    if experiment.guards.audit_every and experiment.strategy == "tensor":
        raise ConfigError(
            "An audit has each device compute a logical shard by itself, and under strategy=tensor none does; got "
            f"guards.audit_every={experiment.guards.audit_every}. Set guards.audit_every=0."
        )
    if isinstance(experiment.model, adapters.Functions) and experiment.loss is not None:
        raise ConfigError(
            "A model given as adapters.Functions has the loss in its own functions, and the experiment's loss would "
            f"never be used; got {setting_group.show(experiment.loss)}. Set loss=None."
        )
    if experiment.eval.metrics and experiment.data.eval is None:
        raise ConfigError("eval.metrics are of held-out examples, and the experiment has no data.eval. Give it some.")
    watched = experiment.stop.target_metric
    looks = experiment.stop.target is not None or experiment.stop.patience is not None
    if looks and experiment.data.eval is None and watched.startswith("eval/"):
        raise ConfigError(
            f"The stop rule looks at {watched}, and the experiment has no data.eval. "
            "Give it held-out data, or set stop.target_metric to a train/ metric."
        )
