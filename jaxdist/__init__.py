"""jaxdist: training of Flax models on many devices.

The public names below are imported when first used, so that `import jaxdist` and `jaxdist --help` cost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdist.cli import main as main
    from jaxdist.config import Checkpoints as Checkpoints
    from jaxdist.config import Data as Data
    from jaxdist.config import Evaluation as Evaluation
    from jaxdist.config import Experiment as Experiment
    from jaxdist.config import Guards as Guards
    from jaxdist.config import Layout as Layout
    from jaxdist.config import Recovery as Recovery
    from jaxdist.data import ArraySource as ArraySource
    from jaxdist.layout import describe as describe
    from jaxdist.loop import fit as fit
    from jaxdist.mesh import make_mesh as make_mesh
    from jaxdist.metrics import Mean as Mean
    from jaxdist.metrics import masked_mean as masked_mean
    from jaxdist.optimizers import Optimizer as Optimizer
    from jaxdist.optimizers import Schedule as Schedule
    from jaxdist.sharded import sharded_step as sharded_step
    from jaxdist.state import TrainState as TrainState
    from jaxdist.state import create_state as create_state
    from jaxdist.step import canonical_step as canonical_step
    from jaxdist.step import data_parallel_step as data_parallel_step
    from jaxdist.step import pmap_step as pmap_step
    from jaxdist.stop import Stop as Stop

_HOMES = {
    "ArraySource": "data",
    "Checkpoints": "config",
    "Data": "config",
    "Evaluation": "config",
    "Experiment": "config",
    "Guards": "config",
    "Layout": "config",
    "Recovery": "config",
    "Mean": "metrics",
    "Optimizer": "optimizers",
    "Schedule": "optimizers",
    "Stop": "stop",
    "TrainState": "state",
    "canonical_step": "step",
    "create_state": "state",
    "data_parallel_step": "step",
    "describe": "layout",
    "fit": "loop",
    "main": "cli",
    "make_mesh": "mesh",
    "masked_mean": "metrics",
    "pmap_step": "step",
    "sharded_step": "sharded",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxdist' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxdist.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
