"""Experiments: the frozen dataclass an experiment file returns, loading that file, and typed overrides.

Configuration is plain Python. What a user may override is exactly what the dataclasses declare; an unknown name is an
error that proposes the nearest one.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import pathlib
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import optax
import pydantic
import pydantic_core

from jaxdist.data import Source
from jaxdist.data.order import Order
from jaxdist.errors import UserError
from jaxdist.optimizers import Optimizer
from jaxdist.paramserver.protocol.settings import ParameterServer
from jaxdist.rundir.writers import Kind
from jaxdist.spmd import layout as layouts
from jaxdist.stop import Stop

ExampleFn: TypeAlias = Callable[[Any, Any], Any]


class ConfigError(UserError):
    """An experiment, or an override of one, that cannot be used as it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What an experiment trains and evaluates on.

    Attributes:
      train: the training examples.
      eval: the held-out examples, or None.
      example_fn: `example_fn(example, random) -> example`, applied to training examples.
      eval_example_fn: the same for evaluation.
      shuffle: whether each epoch has an order of its own.
      order: an Order of `data.order`, in place of what `shuffle` says.
      num_threads: threads that assemble batches; None chooses.
      num_workers: processes that do instead, for an example_fn written in Python.
      prefetch: batches placed on the devices ahead of the step.
      on_bad: whether an example that cannot be read ends the run, or is skipped (mask 0) and reported.
    """

    train: Source
    eval: Source | None = None
    example_fn: ExampleFn | None = None
    eval_example_fn: ExampleFn | None = None
    shuffle: bool = True
    order: Order | None = None
    num_threads: int | None = None
    num_workers: int = 0
    prefetch: int = 2
    on_bad: Literal["raise", "skip"] = "raise"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When to evaluate: every `every_steps` steps, or, where that is None, after every `every_epochs` epochs."""

    every_steps: int | None = None
    every_epochs: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """What is saved, and what is kept of it.

    Attributes:
      every_steps: steps between saves; the last step is always saved.
      keep_last: how many of the newest are kept.
      keep_every: steps whose multiples are kept for good; None keeps none.
      best_metric: the metric whose best checkpoint is kept, `eval/accuracy` say.
      best_mode: whether more or less of it is better.
    """

    every_steps: int = 200
    keep_last: int = 2
    keep_every: int | None = None
    best_metric: str | None = None
    best_mode: Literal["max", "min"] = "max"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guards:
    """How often the checks of `guard` run; 0 switches one off.

    Attributes:
      check_replicas_every: steps between comparisons of the replicas' bits.
      recompile: whether a second compile of the step is reported.
    """

    check_replicas_every: int = 200
    recompile: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """How a run survives.

    Attributes:
      snapshot_every: steps between snapshots in memory, of which at most so many are done again after a death; 0 takes
        none, None as many as cost about two percent of the time. Only a supervised run (`--processes`) takes any:
        without a supervisor nobody would keep them.
      hang_seconds: a step, or the reading of a batch, that takes longer in all processes is a hang.
      slow_seconds: the same for compiling, evaluating, saving and restoring.
      ledger: whether each step's examples are recorded.
      max_fruitless: attempts in a row without a step that lasts, after which a supervised job has failed.
      min_processes: a supervised job that fails again and again goes on with fewer processes, down to this number;
        None never lowers it.
      deadline_seconds: after so many seconds, restarts included, the run stops as if by SIGTERM: saved, "preempted",
        exit status 75; None sets none.
    """

    snapshot_every: int | None = None
    hang_seconds: float = 300.0
    slow_seconds: float = 3600.0
    ledger: bool = False
    max_fruitless: int = 3
    min_processes: int | None = None
    deadline_seconds: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How the state is cut, where the strategy leaves a choice.

    Attributes:
      rules: for the strategy tensor, pairs of a regular expression and the mesh axes of each dim, None for one that is
        not cut: `(("mlp_in/kernel", (None, "model")),)`. The first found in a leaf's path decides. None is the rules of
        our GPT and ViT.
      names: mesh axes for the names that Flax modules gave to the dims of their params: `{"embed": "model"}`.
      min_size: elements below which zero1, fsdp and hsdp leave a leaf whole.
    """

    rules: tuple[tuple[str, tuple[str | tuple[str, ...] | None, ...]], ...] | None = None
    names: dict[str, str | None] | None = None
    min_size: int = layouts.MIN_SIZE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides what is trained; where and on how many devices is the command line's business.

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
      layout: what the strategy leaves open: rules, names, the size of a leaf worth cutting.
      reduction: `mean` (the hardware's all-reduce) or `canonical` (the same bits on any number of devices).
      logical_shards: fixed slices of the batch in canonical reduction, a power of two.
      num_microbatches: parts of each device's batch, computed one after the other.
      precision: dtype of the computation; params are float32 always.
      seed: of the params, the order of examples, dropout and augmentation.
      checkpoints: what is saved.
      guards: how often the checks run.
      recovery: how the run survives what kills it.
      log_every: steps between rows of training metrics.
      writers: where metrics go besides the screen.
    """

    name: str = ""
    model: Any
    loss: Any = None
    inputs: str | tuple[str, ...] = "image"
    data: Data
    optimizer: Optimizer | optax.GradientTransformation
    global_batch_size: int
    stop: Stop
    eval: Evaluation = Evaluation()
    strategy: str = "data-parallel"
    ps: ParameterServer = dataclasses.field(default_factory=ParameterServer)
    mesh: dict[str, int] | None = None
    layout: Layout = Layout()
    reduction: Literal["mean", "canonical"] = "mean"
    logical_shards: int = 8
    num_microbatches: int = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0
    checkpoints: Checkpoints = Checkpoints()
    guards: Guards = Guards()
    recovery: Recovery = Recovery()
    log_every: int = 20
    writers: tuple[Kind, ...] = ("jsonl", "csv", "tensorboard")


def load_experiment(path: str) -> Experiment:
    """Return what the `get_config()` of the Python file `path` returns.

    Raises:
      ConfigError: the file is missing or broken, or has no such function, or it returns something else.
    """
    file = pathlib.Path(path)
    if not file.is_file() or file.suffix != ".py":
        what = "there is none" if not file.exists() else "it is something else"
        raise ConfigError(f"An experiment is a Python file, NAME.py; at {path!r} {what}. Check the path.")
    module = _run_file(file)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ConfigError(f"An experiment file defines get_config(); {path} does not. Add one that returns Experiment.")
    try:
        experiment = get_config()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"get_config() of {path} failed: {_describe(error, file)}") from error
    if not isinstance(experiment, Experiment):
        raise ConfigError(
            f"get_config() must return a jaxdist.Experiment; that of {path} returned {type(experiment).__name__}."
        )
    return experiment if experiment.name else dataclasses.replace(experiment, name=file.stem)


def _run_file(file: pathlib.Path) -> Any:
    # The stem as name makes qualified names in the run record the same however the file was started; a file that runs
    # as a script is loaded a second time under it, which is why experiments only define things.
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{file} cannot be loaded: {_describe(error, file)}") from error
    finally:
        sys.path.pop(0)
    return module


def _describe(error: BaseException, file: pathlib.Path) -> str:
    """Return the error in a line, with the last line of the experiment file that was on its way."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename) == file]
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")


def override(experiment: Experiment, assignments: Sequence[str]) -> Experiment:
    """Return `experiment` with each `a.b=value` applied; values are parsed by the type the field declares.

    Raises:
      ConfigError: not an assignment, no such field (the nearest name is proposed), or a value of another type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set takes NAME=VALUE, for example optimizer.learning_rate=3e-4; got {assignment!r}.")
        experiment = _replace(experiment, path.split("."), text, path)
    return experiment


def _replace(value: Any, names: list[str], text: str, path: str) -> Any:
    fields = _settable_fields(value)
    name = names[0]
    if name not in fields:
        raise ConfigError(_unknown(path, name, list(fields), type(value).__name__))
    if len(names) == 1:
        new = _parse(typing.get_type_hints(type(value)).get(name, str), text, path, getattr(value, name))
    else:
        new = _replace(getattr(value, name), names[1:], text, path)
    try:
        return dataclasses.replace(value, **{name: new})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}={text} is refused: {error}") from error


def _settable_fields(value: Any) -> list[str]:
    if not dataclasses.is_dataclass(value):
        return []
    names = [field.name for field in dataclasses.fields(value) if field.init]
    # Flax gives every Linen module the fields parent and name, which are not hyperparameters.
    return [name for name in names if name not in ("parent", "name")] if "parent" in names else names


def _unknown(path: str, name: str, fields: list[str], owner: str) -> str:
    if not fields:
        return f"There is no setting {path!r}: {owner} has no settings of its own."
    nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    proposal = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"There is no setting {path!r}: {owner} has no field {name!r}.{proposal} It has: {', '.join(fields)}."


def _parse(hint: Any, text: str, path: str, current: Any) -> Any:
    if dataclasses.is_dataclass(current) and not isinstance(current, type):
        names = ", ".join(_settable_fields(current))
        raise ConfigError(f"{path} is a group of settings; set one of its fields: {names}.")
    if hint is Any:  # Says nothing; the value that is there may.
        hint = type(current)
    try:
        adapter = pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(arbitrary_types_allowed=True))
    except (pydantic.errors.PydanticUserError, pydantic_core.SchemaError, TypeError) as error:
        raise ConfigError(f"{path} cannot be set on the command line; edit the experiment file.") from error
    for candidate in _readings(text):
        with contextlib.suppress(pydantic.ValidationError):
            return adapter.validate_python(candidate)
    raise ConfigError(f"{path} takes {_type_name(hint)}; got {text!r}.")


def _readings(text: str) -> list[Any]:
    """Return what `text` may stand for, likeliest first: None, a Python tuple or dict, itself, words between commas."""
    readings: list[Any] = [None] if text.lower() in ("none", "null") else []
    with contextlib.suppress(ValueError, SyntaxError):
        literal = ast.literal_eval(text)
        # A field may take a string or a tuple of them: whoever writes brackets means the tuple.
        return [*readings, literal, text] if isinstance(literal, (tuple, list, dict)) else [*readings, text, literal]
    return [*readings, text, text.split(",")]


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
