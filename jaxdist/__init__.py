"""jaxdist: training of Flax models on many devices.

The public names below are imported when first used, so that `import jaxdist` and `jaxdist --help` cost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdist.cli.main import main as main
    from jaxdist.config.experiment import Checkpoints as Checkpoints
    from jaxdist.config.experiment import Data as Data
    from jaxdist.config.experiment import Evaluation as Evaluation
    from jaxdist.config.experiment import Experiment as Experiment
    from jaxdist.config.experiment import Guards as Guards
    from jaxdist.config.experiment import LayoutSettings as LayoutSettings
    from jaxdist.config.experiment import Recovery as Recovery
    from jaxdist.config.starting_weights import InitFrom as InitFrom
    from jaxdist.config.starting_weights import WeightRule as WeightRule
    from jaxdist.data import ArraySource as ArraySource
    from jaxdist.optimizers import Group as Group
    from jaxdist.optimizers import Optimizer as Optimizer
    from jaxdist.optimizers.schedules import Schedule as Schedule
    from jaxdist.run import hooks as hooks
    from jaxdist.run.loop import fit as fit
    from jaxdist.run.use.from_python import train as train
    from jaxdist.run.use.trained import load as load
    from jaxdist.rundir import rich_values as rich_values
    from jaxdist.spmd.canonical.canonical_step import canonical_step as canonical_step
    from jaxdist.spmd.layout import describe as describe
    from jaxdist.spmd.mesh import make_mesh as make_mesh
    from jaxdist.spmd.metrics import Mean as Mean
    from jaxdist.spmd.metrics import Weighted as Weighted
    from jaxdist.spmd.metrics import masked_mean as masked_mean
    from jaxdist.spmd.sharded import sharded_step as sharded_step
    from jaxdist.spmd.state import InitialState as InitialState
    from jaxdist.spmd.state import TrainState as TrainState
    from jaxdist.spmd.state import create_state as create_state
    from jaxdist.spmd.step import data_parallel_step as data_parallel_step
    from jaxdist.spmd.step import pmap_step as pmap_step
    from jaxdist.stop import Stop as Stop

_HOMES = {
    "ArraySource": "data",
    "Checkpoints": "config.experiment",
    "Data": "config.experiment",
    "Evaluation": "config.experiment",
    "Experiment": "config.experiment",
    "Guards": "config.experiment",
    "Group": "optimizers",
    "InitFrom": "config.starting_weights",
    "InitialState": "spmd.state",
    "LayoutSettings": "config.experiment",
    "Recovery": "config.experiment",
    "Mean": "spmd.metrics",
    "Optimizer": "optimizers",
    "Schedule": "optimizers.schedules",
    "Stop": "stop",
    "TrainState": "spmd.state",
    "WeightRule": "config.starting_weights",
    "Weighted": "spmd.metrics",
    "canonical_step": "spmd.canonical.canonical_step",
    "create_state": "spmd.state",
    "data_parallel_step": "spmd.step",
    "describe": "spmd.layout",
    "fit": "run.loop",
    "hooks": "run",
    "load": "run.use.trained",
    "main": "cli.main",
    "make_mesh": "spmd.mesh",
    "masked_mean": "spmd.metrics",
    "pmap_step": "spmd.step",
    "rich_values": "rundir",
    "sharded_step": "spmd.sharded",
    "train": "run.use.from_python",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxdist' has no attribute {name!r}")
    home = importlib.import_module(f"jaxdist.{_HOMES[name]}")
    return getattr(home, name) if hasattr(home, name) else importlib.import_module(f"{home.__name__}.{name}")


def __dir__() -> list[str]:
    return __all__
