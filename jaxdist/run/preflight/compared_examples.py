"""Whether the loss, or the model, lets an example depend on others, of which a device sees only some."""

import warnings
from collections.abc import Mapping

from jaxdist import adapters, data, errors, losses
from jaxdist.config.experiment import Experiment
from jaxdist.errors import ConfigError
from jaxdist.run.preflight import mixed_examples
from jaxdist.run.preflight.losses_and_metrics import Shapes, outputs_of
from jaxdist.spmd import state


def check_coupling(
    experiment: Experiment,
    functions: adapters.Functions,
    abstract: state.TrainState,
    shapes: Shapes,
    loader: data.Loader,
    *,
    num_together: int,
) -> None:
    """Warn where the loss of an example depends on others, and sees only `num_together` of the batch, or padding.

    Raises:
      ConfigError: the loss is a WholeBatch, and parts of the batch are computed one after the other.
    """
    loss, batch_size = experiment.loss, experiment.global_batch_size
    if isinstance(loss, losses.WholeBatch):
        _check_whole_batch(experiment)
        return
    if num_together < batch_size and _compares(experiment, functions, abstract, shapes, loader):
        advice = "" if _parts_of(experiment) else " losses.WholeBatch(loss) compares those of all devices."
        _warn_of_parts(errors.named(loss), num_together, batch_size, advice)
        return
    is_padded = len(loader.source) % batch_size != 0
    if num_together == batch_size and not is_padded:
        return
    found = mixed_examples.find_mixing(functions, abstract, loader)
    model = experiment.model
    name = errors.named(model.loss_fn if isinstance(model, adapters.Functions) else model)
    if found.of_examples and num_together < batch_size:
        advice = " Return a mean with a count of its own as jaxdist.Mean(total, count)." if loss is None else ""
        _warn_of_parts(name, num_together, batch_size, advice)
    if found.of_padding and is_padded:
        warnings.warn(
            f"The loss of an example, by {name}, depends on rows of padding, of which the last batch of an epoch has "
            "some: copies of a row that counts. Leave out rows that the mask does not mark (a module gets it as a "
            "parameter named 'mask'), or choose a global_batch_size that divides the number of examples.",
            stacklevel=2,
        )


def check_evaluation(
    experiment: Experiment,
    functions: adapters.Functions,
    abstract: state.TrainState,
    eval_loaders: Mapping[str, data.Loader],
) -> None:
    """Warn where a metric of the held-out examples depends on which of them are in one batch.

    A ratio computed for each batch, such as F1, is then averaged over batches. Of the value of a loss that is trained
    nothing is said here.
    """
    model, size = experiment.model, experiment.global_batch_size
    function = model.eval_fn if isinstance(model, adapters.Functions) else experiment.loss or model
    is_trained = not isinstance(model, adapters.Functions) or model.eval_fn is model.loss_fn
    for loader in list(eval_loaders.values())[:1]:
        is_whole = len(loader.source) <= size and experiment.reduction != "canonical"
        if is_whole or isinstance(experiment.loss, losses.WholeBatch):
            return
        found = mixed_examples.mixing_results(functions.eval_fn, abstract, loader)
        if named := ", ".join(name for name in found if name != "loss" or not is_trained):
            warnings.warn(
                f"{named}, of {errors.named(function)}, depends on which held-out examples are in a batch. What is "
                f"reported is the mean of batches of up to {size}, and another number with another batch size. Return "
                "a mean of values of the examples (with a count of its own as jaxdist.Mean(total, count)), or name a "
                "metric that is computed from all of them in Evaluation.metrics, such as losses.F1().",
                stacklevel=2,
            )


def _warn_of_parts(name: str, num_together: int, batch_size: int, advice: str) -> None:
    warnings.warn(
        f"The loss of an example, by {name}, depends on the other examples that it is computed with. These are "
        f"{num_together} of the {batch_size} of a batch here, and another number on other devices.{advice}",
        stacklevel=3,
    )


def _compares(
    experiment: Experiment,
    functions: adapters.Functions,
    abstract: state.TrainState,
    shapes: Shapes,
    loader: data.Loader,
) -> bool:
    """Return whether the loss of a module compares outputs with each other."""
    loss = experiment.loss
    of_package = str(getattr(loss, "__module__", "")).startswith(losses.__name__)  # its tests show that they do not
    if loss is None or of_package or functions.predict_fn is None:
        return False
    outputs = outputs_of(functions, abstract, shapes)
    return any(adapters.are_coupled(loss, outputs, two_examples) for _, two_examples in loader.samples(1, among=1))


def _check_whole_batch(experiment: Experiment) -> None:
    """Raise ConfigError where the examples of a batch are not on all devices at the same time."""
    for setting in _parts_of(experiment):
        raise ConfigError(
            f"losses.WholeBatch needs the whole batch at the same time, and {setting} computes parts of it one after "
            "the other, or far from each other. Change that, or pass the loss without WholeBatch: then it compares the "
            "examples of a part."
        )


def _parts_of(experiment: Experiment) -> list[str]:
    """Return the settings by which parts of a batch are computed at different times or places."""
    settings = {
        f"strategy={experiment.strategy}": experiment.strategy == "parameter-server",
        f"reduction={experiment.reduction}": experiment.reduction == "canonical",
        f"num_microbatches={experiment.num_microbatches}": experiment.num_microbatches > 1,
    }
    return [setting for setting, is_in_parts in settings.items() if is_in_parts]
