"""Optimizers as configuration, turned into optax optimizers.

The one idea: `Optimizer` only describes, `build` builds. Whatever the description cannot say is said in optax:
an `optax.GradientTransformation` is taken in its place everywhere.
"""

from jaxdist.optimizers.averages import EmaState, ema, ema_params, keeps_average, params_in_use, schedule_free_average
from jaxdist.optimizers.building import build
from jaxdist.optimizers.described import SETTINGS, Group, Optimizer, of_optax
from jaxdist.optimizers.param_settings import ParamSettings, decays, describe
from jaxdist.optimizers.rates import RateSchedule, learning_rate_at, make_schedule, units
from jaxdist.optimizers.schedules import Schedule

__all__ = [
    "SETTINGS",
    "EmaState",
    "Group",
    "Optimizer",
    "ParamSettings",
    "RateSchedule",
    "Schedule",
    "build",
    "decays",
    "describe",
    "ema",
    "ema_params",
    "keeps_average",
    "learning_rate_at",
    "make_schedule",
    "of_optax",
    "params_in_use",
    "schedule_free_average",
    "units",
]
