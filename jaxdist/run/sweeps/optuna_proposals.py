"""Trials proposed by Optuna, which learns from the values of those that have ended. The one module that imports it."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxdist import errors, extras
from jaxdist.run.sweeps import space
from jaxdist.stop import Mode


class OptunaProposals:
    """Asks Optuna's TPE sampler for trials.

    The study is in memory. A sweep that is resumed tells it again what its trials gave, so that nothing but the record
    of the sweep need be kept.

    `known` trials were proposed before: what the sampler draws then continues, not repeats.

    Raises:
      UserError: Optuna is not installed.
    """

    def __init__(self, settings: Sequence[space.Setting], mode: Mode, *, seed: int, known: int = 0) -> None:
        with errors.as_user_error():
            optuna = extras.require("optuna", extra="sweep")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna: Any = optuna
        self._settings = list(settings)
        self._distributions = {setting.path: self._distribution(setting) for setting in settings}
        sampler = optuna.samplers.TPESampler(seed=seed + known)
        self._study = optuna.create_study(direction="maximize" if mode == "max" else "minimize", sampler=sampler)
        self._asked: dict[tuple[tuple[str, str], ...], Any] = {}

    def propose(self) -> dict[str, str]:
        """Return the settings of the next trial."""
        asked = self._study.ask(self._distributions)
        found = {
            setting.path: setting.text(asked.params[setting.path])
            if isinstance(setting, space.Range)
            else asked.params[setting.path]
            for setting in self._settings
        }
        self._asked[tuple(found.items())] = asked
        return found

    def tell(self, settings: Mapping[str, str], value: float | None) -> None:
        """Tell the value of a trial that has ended; None for one that failed."""
        states = self._optuna.trial.TrialState
        state = states.FAIL if value is None else states.COMPLETE
        asked = self._asked.pop(tuple(settings.items()), None)
        if asked is not None:
            self._study.tell(asked, value, state=state)
            return
        params = {
            setting.path: self._number(setting, settings[setting.path])
            if isinstance(setting, space.Range)
            else settings[setting.path]
            for setting in self._settings
        }
        made = self._optuna.trial.create_trial(
            params=params, distributions=self._distributions, value=value, state=state
        )
        self._study.add_trial(made)

    def _distribution(self, setting: space.Setting) -> Any:
        made = self._optuna.distributions
        if isinstance(setting, space.Choices):
            return made.CategoricalDistribution(setting.values)
        if setting.whole:
            return made.IntDistribution(int(setting.low), int(setting.high), log=setting.log)
        return made.FloatDistribution(setting.low, setting.high, log=setting.log)

    @staticmethod
    def _number(setting: space.Range, text: str) -> float:
        return int(text) if setting.whole else min(max(float(text), setting.low), setting.high)
