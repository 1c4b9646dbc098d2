"""Why training ends: small rules over the progress so far, composed with `first_of`.

A rule is a function `rule(progress) -> end reason or None`. Rules keep nothing themselves: what they look at is in the
Progress, which is saved with each checkpoint, so a resumed run ends where the undisturbed one would have.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from jaxdist.setting_group import setting_group

StopRule: TypeAlias = Callable[["Progress"], str | None]
Mode: TypeAlias = Literal["max", "min"]


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Attributes:
      step: finished steps.
      epoch: finished epochs.
      examples_seen: true examples trained on, counted again in each epoch.
      seconds: wall time of training over all attempts.
      metrics: the last value of each metric: `train/loss`, `eval/accuracy` and the like. The training metrics of a step
        are here from the next step on.
      history: every value an evaluation gave, by metric name.
      last_evaluation: the step of the newest evaluation, 0 before the first.
      global_batch_size: examples of a step; None before the first attempt has said it.
      schedule_offset: steps of the present batch size that the steps made so far lack, or have too many, because some
        of them were made with another batch size; see `schedule_offset`.
      empty_batches: steps without an update, because nothing in their batch counted.
      best: {metric, value, step} of the best value so far of the metric that is watched, None before the first.
      of_this_step: training metrics of the present step, where they were read already.
    """

    step: int = 0
    epoch: int = 0
    examples_seen: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    last_evaluation: int = 0
    global_batch_size: int | None = None
    schedule_offset: int = 0
    empty_batches: int = 0
    best: dict[str, Any] | None = None
    of_this_step: dict[str, float] = dataclasses.field(default_factory=dict)

    def advance(self, step: int, examples_seen: int, num_examples: int) -> None:
        """Note that `step` is finished; an epoch is finished with the last of its `num_examples` examples."""
        self.step, self.examples_seen, self.epoch = step, examples_seen, examples_seen // num_examples
        if self.of_this_step:
            self.metrics.update(self.of_this_step)
            self.of_this_step = {}

    def record_training(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the training metrics of `step`.

        They are usually read one step late, but before the step is saved. A rule must not see them sooner then: the run
        would end at another step when it is saved at other steps.
        """
        (self.metrics if step < self.step else self.of_this_step).update(metrics)

    def newest_metrics(self) -> dict[str, float]:
        """Return the last value of each metric that was read, those of the present step too."""
        return self.metrics | self.of_this_step

    def count_empty(self, steps: int) -> None:
        """Note steps without an update, because nothing in their batch counted."""
        if steps:
            self.empty_batches += steps
            self.metrics["train/empty_batches"] = self.empty_batches

    def record_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Record the result of an evaluation after the present step."""
        self.last_evaluation = self.step
        self.metrics.update(metrics)
        for name, value in metrics.items():
            self.history.setdefault(name, []).append(value)

    def record_best(self, metric: str, value: float, mode: Mode) -> bool:
        """Record the value of the watched metric after the present step; return whether it is the best so far.

        One that is not finite is none.
        """
        best = self.best if self.best and self.best["metric"] == metric else None
        if not math.isfinite(value) or (best and _sign(mode) * value <= _sign(mode) * best["value"]):
            return False
        self.best = {"metric": metric, "value": value, "step": self.step}
        return True

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Progress":
        """Return the Progress that `to_json` gave."""
        return cls(**fields)


def schedule_offset(progress: Progress, *, global_batch_size: int, num_examples: int, steps_per_epoch: int) -> int:
    """Return what to add to the steps made so far, to have the steps of this batch size that come to as many examples.

    It is computed only where the batch size changes, so that a run that is resumed without a change has the bits of
    one that was never stopped.

    `global_batch_size` and `steps_per_epoch` are the present ones; `num_examples` are those of an epoch.
    """
    if progress.global_batch_size == global_batch_size:
        return progress.schedule_offset
    epochs, rest = divmod(progress.examples_seen, num_examples)
    return epochs * steps_per_epoch + min(math.ceil(rest / global_batch_size), steps_per_epoch) - progress.step


def first_of(*rules: StopRule) -> StopRule:
    """Return the rule that ends when any of `rules` does, with the reason of the first in order."""

    def rule(progress: Progress) -> str | None:
        for each in rules:  # no generator: it would take twice as long, in every step
            if reason := each(progress):
                return reason
        return None

    return rule


def max_steps(limit: int) -> StopRule:
    """End after `limit` steps."""
    return lambda progress: "max_steps" if progress.step >= limit else None


def max_epochs(limit: int) -> StopRule:
    """End after `limit` whole epochs."""
    return lambda progress: "max_epochs" if progress.epoch >= limit else None


def max_seconds(limit: float) -> StopRule:
    """End after `limit` seconds of training."""
    return lambda progress: "max_seconds" if progress.seconds >= limit else None


def target(metric: str, value: float, *, mode: Mode = "max") -> StopRule:
    """End when `metric` has reached `value`: at least for mode "max", at most for "min"."""
    sign = _sign(mode)

    def rule(progress: Progress) -> str | None:
        reached = metric in progress.metrics and sign * progress.metrics[metric] >= sign * value
        return "target_reached" if reached else None

    return rule


def patience(metric: str, evaluations: int, *, mode: Mode = "max") -> StopRule:
    """End when the best value of `metric` is `evaluations` evaluations old."""

    def rule(progress: Progress) -> str | None:
        values = progress.history.get(metric, [])
        return "patience" if values and best_of(values, mode)[1] >= evaluations else None

    return rule


def best_of(values: Sequence[float], mode: Mode) -> tuple[float, int]:
    """Return the best of `values`, the first where several are, and how many came after it."""
    # NaN is worse than any value; left as it is, it would compare as neither better nor worse.
    ranked = [-math.inf if math.isnan(value) else _sign(mode) * value for value in values]
    best = max(range(len(ranked)), key=lambda i: (ranked[i], -i))
    return values[best], len(values) - 1 - best


def nonfinite() -> StopRule:
    """End when the training loss is NaN or infinite."""
    return lambda progress: "nonfinite" if not math.isfinite(progress.metrics.get("train/loss", 0.0)) else None


@setting_group
class Stop:
    """When an experiment ends; every limit that is set counts, whichever comes first.

    Attributes:
      max_steps: steps.
      max_epochs: passes over the training examples.
      max_seconds: wall time of training, over all attempts.
      target_metric: name of the metric that `target` and `patience` look at.
      target: the value to reach.
      patience: evaluations without a better value.
      mode: whether larger ("max") or smaller ("min") values are better.
    """

    max_steps: int | None = None
    max_epochs: int | None = None
    max_seconds: float | None = None
    target_metric: str = "eval/accuracy"
    target: float | None = None
    patience: int | None = None
    mode: Mode = "max"

    def last_step(self, steps_per_epoch: int, *, step_offset: int = 0) -> int | None:
        """Return the step at which a run ends at the latest, None if no limit in steps or epochs is set.

        `steps_per_epoch` is that of the present batch size; for `step_offset` see `Progress.schedule_offset`.
        """
        ends = [] if self.max_steps is None else [self.max_steps]
        ends += [] if self.max_epochs is None else [math.ceil(self.max_epochs * steps_per_epoch) - step_offset]
        return min(ends, default=None)

    def rule(self) -> StopRule:
        """Return the rule that these limits describe.

        Raises:
          ValueError: no limit is set, or one is not positive.
        """
        limits = {
            "max_steps": self.max_steps,
            "max_epochs": self.max_epochs,
            "max_seconds": self.max_seconds,
            "patience": self.patience,
        }
        for name, limit in limits.items():
            if limit is not None and not limit > 0:  # NaN, too
                raise ValueError(f"stop.{name} must be positive; got {limit}.")
        if self.target is not None and math.isnan(self.target):
            raise ValueError("stop.target must be a number that a metric can reach; got nan.")
        rules = [nonfinite()]
        rules += [target(self.target_metric, self.target, mode=self.mode)] if self.target is not None else []
        rules += [max_steps(self.max_steps)] if self.max_steps is not None else []
        rules += [max_epochs(self.max_epochs)] if self.max_epochs is not None else []
        rules += [patience(self.target_metric, self.patience, mode=self.mode)] if self.patience is not None else []
        rules += [max_seconds(self.max_seconds)] if self.max_seconds is not None else []
        if len(rules) == 1:
            raise ValueError(
                "A run needs a rule that ends it; none is set. Set one of stop.max_steps, stop.max_epochs, "
                "stop.max_seconds, stop.target or stop.patience."
            )
        return first_of(*rules)


def _sign(mode: Mode) -> int:
    return 1 if mode == "max" else -1
