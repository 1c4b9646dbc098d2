"""Whether the loss compares examples with each other, of which a device sees only some."""

import warnings

from jaxdist import adapters, data, errors, losses
from jaxdist.config.experiment import Experiment
from jaxdist.errors import ConfigError
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
    """Warn where the loss of an example depends on others, and sees only `num_together` of the batch.

    Raises:
      ConfigError: the loss is a WholeBatch, and parts of the batch are computed one after the other.
    """
    loss, batch_size = experiment.loss, experiment.global_batch_size
    if isinstance(loss, losses.WholeBatch):
        _check_whole_batch(experiment)
        return
    of_package = str(getattr(loss, "__module__", "")).startswith(losses.__name__)  # its tests show that they do not
    if loss is None or of_package or num_together == batch_size or functions.predict_fn is None:
        return
    outputs = outputs_of(functions, abstract, shapes)
    for _, two_examples in loader.samples(1, among=1):
        if adapters.are_coupled(loss, outputs, two_examples):
            advice = "" if _parts_of(experiment) else " losses.WholeBatch(loss) compares those of all devices."
            warnings.warn(
                f"The loss of an example, by {errors.named(loss)}, depends on the other examples that it is computed "
                f"with. These are {num_together} of the {batch_size} of a batch here, and another number on other "
                f"devices.{advice}",
                stacklevel=2,
            )


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
