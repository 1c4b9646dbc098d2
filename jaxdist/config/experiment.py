"""Experiments: the frozen dataclass that an experiment file returns, and the groups of settings in it."""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import optax

from jaxdist import adapters
from jaxdist.config import data_fields, hook_points, starting_weights
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.config.starting_weights import InitFrom
from jaxdist.data import Source
from jaxdist.data.order import Order
from jaxdist.data.sources import vocabulary
from jaxdist.errors import ConfigError
from jaxdist.optimizers import Optimizer
from jaxdist.rundir import open_writers
from jaxdist.setting_group import setting_group, show
from jaxdist.spmd import layout as layouts
from jaxdist.stop import Stop

MOST_SEEDS = 1 << 32
USUAL_PERIOD = 200
"""Steps between checkpoints, where the experiment does not say."""
ExampleFn: TypeAlias = Callable[[Any, Any], Any]
BatchFn: TypeAlias = Callable[[Any, Any, Any], Any]


@setting_group
class Data:
    """What an experiment trains and evaluates on.

    Examples may be given as a Source, as any data set with `len` and items that are dicts, as a dict of arrays
    (`{"image": images, "label": labels}`), as a DataFrame, whose columns are the fields, or as a pair of arrays
    `(x, y)`, which become the fields "image" and "label". What is read forward is a `data.StreamSource`.

    Attributes:
      train: the training examples.
      eval: the held-out examples, or None; or several sets of them by name, `{"day": ..., "night": ...}`, whose metrics
        are `eval/day/accuracy` and so on.
      example_fn: `example_fn(example, random) -> example`, applied to training examples.
      eval_example_fn: the same for evaluation.
      batch_fn: `batch_fn(batch, random, rows) -> batch`, applied to training batches: mixup and the like, see
        `data.batch_transforms`.
      shuffle: whether each epoch has an order of its own.
      order: an Order of `data.order`; replaces `shuffle`.
      num_threads: threads that assemble batches; None chooses.
      num_workers: processes that assemble batches instead of threads, for an example_fn written in Python.
      prefetch: batches placed on the devices ahead of the step; of small ones that need no worker 8 to 16.
      on_bad: whether an example that cannot be read ends the run, or is skipped (mask 0) and reported.
      timeout_seconds: an example that takes longer to read and transform ends the run, and is named; None waits.
      strict: whether the fingerprint of the training examples is of all contents instead of samples; `--strict`.
    """

    train: Source
    eval: Source | dict[str, Source] | None = None
    example_fn: ExampleFn | None = None
    eval_example_fn: ExampleFn | None = None
    batch_fn: BatchFn | None = None
    shuffle: bool = True
    order: Order | None = None
    num_threads: int | None = None
    num_workers: int = 0
    prefetch: int = 2
    on_bad: Literal["raise", "skip"] = "raise"
    timeout_seconds: float | None = None
    strict: bool = False

    @staticmethod
    def accept(values: dict[str, Any]) -> dict[str, Any]:
        """Return the settings with the examples made Sources."""
        for name, arguments in data_fields.CALLED_WITH.items():
            data_fields.check_call(values.get(name), f"Data.{name}", arguments)
        found: dict[str, Any] = {}
        if values.get("train") is not None:
            found["train"] = data_fields.as_source(values["train"], "Data.train")
        if values.get("eval") is not None:
            found["eval"] = data_fields.as_sources(values["eval"], "Data.eval")
        sources = [source for given in found.values() for source in data_fields.named_sources(given).values()]
        vocabulary.check_same_vocabulary(sources, what="Training and held-out data")
        return values | found


@setting_group
class Evaluation:
    """When to evaluate: every `every_steps` steps, or, where that is None, after every `every_epochs` epochs.

    Attributes:
      every_steps: steps between evaluations.
      every_epochs: epochs between them.
      metrics: metrics that are no means of values of examples, such as `losses.F1()`; see `losses.collected`.
    """

    every_steps: int | None = None
    every_epochs: int = 1
    metrics: tuple[Any, ...] = ()

    @staticmethod
    def accept(values: dict[str, Any]) -> dict[str, Any]:
        """Return the settings; raise ConfigError if an entry is not a metric."""
        metrics = values.get("metrics", ())
        for metric in metrics if isinstance(metrics, tuple | list) else ():
            if not all(hasattr(metric, name) for name in ("names", "collect", "compute")) or isinstance(metric, type):
                raise ConfigError(
                    "Evaluation.metrics holds objects with names, collect and compute, such as losses.F1(); got "
                    f"{show(metric)}."
                )
        return values


@setting_group
class Checkpoints:
    """What is saved, and which checkpoints are kept.

    Attributes:
      every_steps: steps between saves; None saves at multiples of 200 steps, those left out at which saving would take
        more than a twentieth of the time. The last step is always saved.
      keep_last: how many of the newest are kept.
      keep_every: checkpoints at multiples of this many steps are never deleted; None keeps none.
      best_metric: the metric whose best checkpoint is kept, for example `eval/accuracy`.
      best_mode: whether larger or smaller values are better.
    """

    every_steps: int | None = None
    keep_last: int = 2
    keep_every: int | None = None
    best_metric: str | None = None
    best_mode: Literal["max", "min"] = "max"

    @property
    def period(self) -> int:
        """The steps whose multiples are saved."""
        return self.every_steps or USUAL_PERIOD


@setting_group
class Guards:
    """How often the checks of `guards` run; 0 turns a check off.

    Attributes:
      check_replicas_every: steps between comparisons of the replicas' bits.
      recompile: whether a second compile of the step is reported.
      audit_every: canonical steps between audits, in each of which all devices compute one logical shard, and one that
        computes wrongly is named.
      on_faulty_device: whether that ends the run or is told and recorded.
      step_hashes: whether canonical runs record hashes of each step, for `jaxdist diff` and `jaxdist replay`.
    """

    check_replicas_every: int = 200
    recompile: bool = True
    audit_every: int = 0
    on_faulty_device: Literal["end", "continue"] = "end"
    step_hashes: bool = True


@setting_group
class Recovery:
    """How a run survives failures.

    Attributes:
      snapshot_every: steps between in-memory snapshots, and so the most that are repeated after a crash; 0 takes
        none, None as many as cost about two percent of the time. Only a supervised run (`--processes`) takes any:
        without a supervisor no process would keep them.
      hang_seconds: a step, or the reading of a batch, that takes longer in all processes is a hang.
      slow_seconds: the same for compiling, evaluating, saving and restoring.
      ledger: whether each step's examples are recorded.
      max_fruitless: attempts in a row without a new saved step, after which a supervised job fails.
      min_processes: the least number of processes to which a supervised job that keeps failing is reduced;
        None never lowers it.
      patience_seconds: how long a supervised job waits for processes that joined it and were lost, or for a host that
        was, to come back, before it continues with those that are left.
      deadline_seconds: after so many seconds, restarts included, the run stops as if by SIGTERM: saved, "preempted",
        exit status 75; None sets none.
      standby: whether a supervised job keeps the processes of its next attempt ready, so that a restart takes less than
        a second; None does so on CPU devices if there is memory for as many processes again. On accelerators the two
        must share the memory.
    """

    snapshot_every: int | None = None
    hang_seconds: float = 300.0
    slow_seconds: float = 3600.0
    ledger: bool = False
    max_fruitless: int = 3
    min_processes: int | None = None
    patience_seconds: float = 0.0
    deadline_seconds: float | None = None
    standby: bool | None = None


@setting_group
class LayoutSettings:
    """How the state is sharded, where the strategy leaves a choice.

    Attributes:
      rules: for the strategy tensor, pairs of a regular expression and the mesh axes of each dim, None for one that is
        not sharded: `(("mlp_in/kernel", (None, "model")),)`. The first found in a leaf's path decides. None is the
        rules of our GPT and ViT.
      names: mesh axes for the names that Flax modules gave to the dims of their params: `{"embed": "model"}`.
      min_size: elements below which zero1, fsdp and hsdp leave a leaf whole.
    """

    rules: tuple[tuple[str, tuple[str | tuple[str, ...] | None, ...]], ...] | None = None
    names: dict[str, str | None] | None = None
    min_size: int = layouts.MIN_SIZE


@setting_group
class Experiment:
    """Everything that decides what is trained; the command line decides where and on how many devices.

    Attributes:
      name: names the run directory; by default the experiment file's stem.
      model: a Linen module, a callable from `nnx.Rngs` to an NNX module, or `adapters.Functions`.
      loss: `loss(outputs, batch) -> (values, {name: values})` per example or token; see `losses`.
      inputs: the batch field, or fields, the model is called with.
      data: the examples.
      optimizer: an `optimizers.Optimizer`, or an optax.GradientTransformation.
      global_batch_size: examples of one step, over all devices.
      stop: when training ends.
      eval: when to evaluate.
      strategy: how the model is spread over the devices.
      ps: for the strategy parameter-server: how many workers and servers, mode, durability.
      mesh: axis names and sizes; None is what the strategy makes of all devices.
      layout: what the strategy leaves open: rules, names, the least size of a sharded leaf.
      reduction: `mean` (the hardware's all-reduce) or `canonical` (the same bits on any number of devices).
      logical_shards: fixed slices of the batch in canonical reduction; at least as many as devices.
      num_microbatches: parts of each device's batch, computed one after the other.
      precision: dtype of the computation; params are float32 always.
      seed: of the params, the order of examples, dropout and augmentation.
      init_from: weights that the run begins with, a path or an InitFrom; None begins with random params.
      checkpoints: what is saved.
      guards: how often the checks run.
      recovery: how the run survives failures.
      log_every: steps between rows of training metrics.
      writers: where metrics are written besides the screen: console, jsonl, csv, tensorboard, wandb, mlflow, or the
        name of a writer that a package adds; see `rundir.open_writers`.
      hooks: functions and objects of your own that are called in the run; see `run.custom.user_hooks`.
    """

    name: str = ""
    model: Any
    loss: Callable[[Any, Any], Any] | None = None
    inputs: str | tuple[str, ...] = "image"
    data: Data
    optimizer: Optimizer | optax.GradientTransformation
    global_batch_size: int
    stop: Stop
    eval: Evaluation = Evaluation()
    strategy: str = "data-parallel"
    ps: ParameterServer = dataclasses.field(default_factory=ParameterServer)
    mesh: dict[str, int] | None = None
    layout: LayoutSettings = LayoutSettings()
    reduction: Literal["mean", "canonical"] = "mean"
    logical_shards: int = 8
    num_microbatches: int = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0
    init_from: InitFrom | str | None = None
    checkpoints: Checkpoints = Checkpoints()
    guards: Guards = Guards()
    recovery: Recovery = Recovery()
    log_every: int = 20
    writers: tuple[str, ...] = ("jsonl", "csv", "tensorboard")
    hooks: tuple[Any, ...] = ()

    @staticmethod
    def accept(values: dict[str, Any]) -> dict[str, Any]:
        """Return the settings; raises ConfigError where an object is of another kind than the one that is meant."""
        if "model" in values:
            adapters.check_model(values["model"])
        if "optimizer" in values:
            _check_optimizer(values["optimizer"])
        if "stop" in values and not isinstance(values["stop"], Stop):
            raise ConfigError(
                f"Experiment.stop takes a jaxdist.Stop; got {show(values['stop'])}. Write, for example, "
                "jaxdist.Stop(max_steps=1000)."
            )
        seed = values.get("seed", 0)
        if isinstance(seed, numbers.Integral) and not 0 <= int(seed) < MOST_SEEDS:
            raise ConfigError(f"Experiment.seed is from 0 to {MOST_SEEDS - 1}, as JAX's keys take 32 bits; got {seed}.")
        writers = values.get("writers", ())
        if isinstance(writers, tuple | list) and len(set(writers)) < len(writers):
            raise ConfigError(f"Experiment.writers names each writer once; got {writers}. Remove the second.")
        if isinstance(values.get("hooks"), tuple | list):
            hook_points.check(values["hooks"])
        for name in writers if isinstance(writers, tuple | list) else ():
            open_writers.check_name(str(name))
        if "init_from" in values:
            values = values | {"init_from": starting_weights.as_init_from(values["init_from"])}
        if set(str(values.get("name", ""))) & set("/\0"):
            raise ConfigError(f"Experiment.name names the run directory, so it has no slash; got {values['name']!r}.")
        if values.get("inputs") in ((), [], ""):
            raise ConfigError("Experiment.inputs names the batch fields the model is called with; got none. Name one.")
        return values


def _check_optimizer(optimizer: Any) -> None:
    if isinstance(optimizer, Optimizer | optax.GradientTransformation):
        return
    advice = "Write, for example, jaxdist.Optimizer(name='adam', learning_rate=1e-3) or optax.adam(1e-3)."
    if isinstance(optimizer, optax.MultiSteps):
        advice = "Use its gradient_transformation(); or set num_microbatches, which sums gradients inside one step."
    elif callable(optimizer):
        advice = f"Call it with a learning rate, as in optax.{getattr(optimizer, '__name__', 'adam')}(1e-3)."
    elif isinstance(optimizer, str):
        advice = f"Write jaxdist.Optimizer(name={optimizer!r}, learning_rate=...)."
    raise ConfigError(
        f"Experiment.optimizer takes a jaxdist.Optimizer or an optax.GradientTransformation; got {show(optimizer)}. "
        f"{advice}"
    )
