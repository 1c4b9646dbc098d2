"""Whether the loss, the evaluation and the metrics are what a run needs: they are traced, and nothing is computed."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.export
import jax.numpy as jnp

from jaxdist import adapters, errors
from jaxdist.config import data_fields
from jaxdist.config.experiment import Experiment
from jaxdist.errors import ConfigError
from jaxdist.run.preflight.repeated_traces import check_same_trace
from jaxdist.spmd import evaluate, jax_private, metrics, reduce, state
from jaxdist.spmd.dependence import depends
from jaxdist.spmd.step import GRAD_NORM

Shapes: TypeAlias = Mapping[str, jax.ShapeDtypeStruct]


def check(
    experiment: Experiment,
    functions: adapters.Functions,
    abstract: state.TrainState,
    shapes: Shapes,
    eval_shapes: Mapping[str, Shapes],
    collect_fn: evaluate.CollectFn | None,
) -> None:
    """Trace the loss, and the evaluation where there is one; check what they report.

    `shapes` are those of a training batch, `eval_shapes` those of a batch of each set of held-out examples, by name.
    `collect_fn` collects the rows of the metrics that are no means; None without any.

    Raises:
      ConfigError: a metric has a name that the run uses itself, a rule needs a metric that is never reported, or a
        model is another at each trace in a run that promises the same bits.
      UserError: the user's model or loss raises, with the place where.
    """
    if not jax.tree.leaves(abstract.params):
        raise ConfigError("A model that is trained has params, and this one has none. Give it a layer that learns.")
    reduce.check_params(abstract.params)
    reduce.check_model_state(abstract.model_state)
    same_bits = experiment.reduction == "canonical"
    check_same_trace("What creates the params", functions.init_fn, [abstract.key], same_bits=same_bits)
    gradient = _gradient_of(functions.loss_fn)
    reported = [f"train/{name}" for name in _trained(gradient, abstract, shapes, same_bits=same_bits)]
    _check_gradient(gradient, abstract, shapes)
    is_plain = isinstance(experiment.model, adapters.Functions)  # others are checked by their adapter
    if is_plain:
        _check_means(functions.loss_fn, abstract, shapes)
    for name, own_shapes in eval_shapes.items():
        setting = data_fields.setting_of_set(name)
        _check_fields(shapes, own_shapes, setting)
        try:
            found = _evaluated(functions.eval_fn, abstract, own_shapes, same_bits=same_bits)
            if is_plain:
                _check_means(functions.eval_fn, abstract, own_shapes)
            collected = _collected(experiment, collect_fn, abstract, own_shapes, same_bits=same_bits)
        except Exception as error:
            raise ConfigError(f"The evaluation fails on the examples of {setting}: {errors.describe(error)}") from error
        _check_collected(found, collected)
        reported += [f"eval/{name}/{each}" if name else f"eval/{each}" for each in (*found, *collected)]
    _check_watched(experiment, reported)


def outputs_of(functions: adapters.Functions, abstract: state.TrainState, shapes: Shapes) -> Any:
    """Return shapes and dtypes of what a model returns for a batch of these shapes."""
    assert functions.predict_fn is not None
    model_state = () if abstract.model_state is None else (abstract.model_state,)
    return jax.eval_shape(functions.predict_fn, abstract.params, dict(shapes), *model_state)


def check_order(functions: adapters.Functions, abstract: state.TrainState, shapes: Shapes) -> None:
    """Raise ConfigError where the loss calls back in order, which parts of a batch on several devices do not have."""
    if jax_private.has_order(jax.make_jaxpr(_loss_of(functions.loss_fn))(*_arguments(abstract, shapes)).jaxpr):
        raise ConfigError(
            "The model or its loss has a callback with ordered=True (jax.debug.print and the like), and the parts of a "
            "batch are computed side by side here, in no order. Leave `ordered` out, or train on one device with "
            "reduction=mean."
        )


def check_forms(
    functions: adapters.Functions, abstract: state.TrainState, forms: Sequence[Shapes], *, held_out: bool
) -> None:
    """Trace the loss, or the evaluation, for the shapes of further batches, such as those of longer examples.

    Raises:
      UserError: it fails for one of them; the message names the shapes.
    """
    for form in forms[1:]:
        try:
            if held_out:
                jax.eval_shape(evaluate.eval_step(functions.eval_fn), *_arguments(abstract, form)[:3])
            else:
                jax.eval_shape(_loss_of(functions.loss_fn), *_arguments(abstract, form))
        except Exception as error:
            what, setting = ("The evaluation", "data.eval") if held_out else ("Training", "data.train")
            shapes = ", ".join(f"{name} {field.shape[1:]}" for name, field in form.items() if name != metrics.MASK)
            raise ConfigError(
                f"{what} fails on some examples of {setting}, those with the shapes {shapes}: {errors.describe(error)}"
            ) from error


def _trained(gradient: Any, abstract: state.TrainState, shapes: Shapes, *, same_bits: bool) -> list[str]:
    """Return the names of the training metrics, after checking all that a step would refuse."""
    args = _arguments(abstract, shapes)
    _, (_, found, _) = check_same_trace("The model with its loss", gradient, args, same_bits=same_bits)
    metrics.check_names(found)
    return ["loss", *found, GRAD_NORM]


def _gradient_of(loss_fn: Any) -> Callable[..., Any]:
    """Return the gradient of the total, with loss, metrics and model_state; a function that is traced once."""

    def total(*args: Any) -> Any:
        loss, *others = reduce.evaluate_loss(loss_fn, *args)
        return loss.total, (loss, *others)

    return jax.grad(total, has_aux=True)


def _loss_of(loss_fn: Any) -> Callable[..., Any]:
    return lambda *args: reduce.evaluate_loss(loss_fn, *args)


def _arguments(abstract: state.TrainState, shapes: Shapes) -> list[Any]:
    return [abstract.params, abstract.model_state, dict(shapes), abstract.key]


def _check_means(loss_fn: Any, abstract: state.TrainState, shapes: Shapes) -> None:
    """Raise ValueError where the means of plain functions count padding, or values of a shape that is too large."""
    args = (
        abstract.params,
        dict(shapes),
        abstract.key,
        *([] if abstract.model_state is None else [abstract.model_state]),
    )
    loss, found, *_ = jax.eval_shape(loss_fn, *args)
    means = {name: each for name, each in {"loss": loss, **found}.items() if isinstance(each, metrics.Mean)}
    metrics.check_rows_left_out(means, loss_fn, args)
    (examples,) = jax.export.symbolic_shape("B")
    any_number = {
        name: jax.ShapeDtypeStruct((examples, *field.shape[1:]), field.dtype) for name, field in shapes.items()
    }
    try:
        jax.eval_shape(loss_fn, args[0], any_number, *args[2:])
    except metrics.ShapeError as error:
        place = errors.place_of(error)
        raise ConfigError(f"{error} ({place})" if place else str(error)) from error
    except Exception:
        return  # functions that are made for one number of examples are fine


def _check_gradient(gradient: Any, abstract: state.TrainState, shapes: Shapes) -> None:
    """Raise ConfigError where the gradient of every param is 0 whatever the params and the batch are."""
    args = _arguments(abstract, shapes)
    if any(jax.tree.leaves(depends(gradient, args, jax.tree.map(lambda _: True, args))[0])):
        return
    # It is the same for any arguments, so these do.
    zeros = [jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), arg) for arg in args[:3]]
    if not any(leaf.any() for leaf in jax.tree.leaves(jax.jit(gradient)(*zeros, jax.random.key(0))[0])):
        raise ConfigError(
            "Training needs a loss with a gradient, and that of every param is 0 here, whatever the batch. Remove what "
            "has no gradient (argmax, round, a comparison, stop_gradient) between the params and the loss."
        )


def _evaluated(eval_fn: Any, abstract: state.TrainState, shapes: Shapes, *, same_bits: bool) -> list[str]:
    """Return the names of the evaluation's metrics."""
    step, args = evaluate.eval_step(eval_fn), _arguments(abstract, shapes)[:3]
    return list(check_same_trace("The evaluation", step, args, same_bits=same_bits))


def _collected(
    experiment: Experiment,
    collect_fn: evaluate.CollectFn | None,
    abstract: state.TrainState,
    shapes: Shapes,
    *,
    same_bits: bool,
) -> list[str]:
    """Return the names of the metrics that are no means, whose rows are checked to be one for each example."""
    if collect_fn is None:
        return []
    args = _arguments(abstract, shapes)[:3]
    rows = check_same_trace("What eval.metrics collect", collect_fn, args, same_bits=same_bits)
    size = next(iter(shapes.values())).shape[0]
    for metric, own in zip(experiment.eval.metrics, rows, strict=True):
        wrong = [name for name, leaf in own.items() if leaf.shape[:1] != (size,)]
        if wrong:
            raise ValueError(
                f"{type(metric).__name__} collects a row for each of {size} examples, but {wrong[0]!r} has shape "
                f"{own[wrong[0]].shape}."
            )
    return [name for metric in experiment.eval.metrics for name in metric.names]


def _check_collected(means: list[str], collected: list[str]) -> None:
    metrics.check_names(dict.fromkeys(collected))
    names = [*means, *collected]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"Each metric of an evaluation has a name of its own; {', '.join(twice)} comes twice.")


def _check_fields(shapes: Shapes, eval_shapes: Shapes, setting: str) -> None:
    missing = sorted(set(shapes) - set(eval_shapes))
    if missing:
        raise ConfigError(
            f"The examples of {setting} need the fields of the training examples; {', '.join(missing)} is missing. "
            f"They have: {', '.join(sorted(eval_shapes))}."
        )


def _check_watched(experiment: Experiment, reported: list[str]) -> None:
    """Raise ConfigError where a stop rule or the choice of the best checkpoint needs a metric that is not reported."""
    stop, best = experiment.stop, experiment.checkpoints.best_metric
    watched = {"checkpoints.best_metric": best} if best is not None else {}
    if stop.target is not None or stop.patience is not None:
        watched["stop.target_metric"] = stop.target_metric
    for setting, metric in watched.items():
        if metric not in reported:
            nearest = difflib.get_close_matches(metric, reported, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{setting} is {metric!r}, which this experiment does not report. Did you mean {nearest!r}? "
                f"It reports: {', '.join(reported)}."
            )
    if stop.patience is not None and not stop.target_metric.startswith("eval/"):
        raise ConfigError(f"stop.patience counts evaluations, but {stop.target_metric} is no eval/ metric. Name one.")
