"""Checks before a run directory exists: model, loss, metrics, examples and optimizer are tried as a run will use them.

Model and loss are traced with the shapes of a batch, as compiling would do later; some examples are read,
and plain functions that may return sums are tried on two of them.
"""

from jaxdist.run.preflight.compared_examples import check_coupling as check_coupling
from jaxdist.run.preflight.compared_examples import check_evaluation as check_evaluation
from jaxdist.run.preflight.doubled_examples import check_no_sums as check_no_sums
from jaxdist.run.preflight.examples import EARLY_BATCHES as EARLY_BATCHES
from jaxdist.run.preflight.examples import check_arrays_of_their_own as check_arrays_of_their_own
from jaxdist.run.preflight.examples import check_labels as check_labels
from jaxdist.run.preflight.examples import check_repeatable as check_repeatable
from jaxdist.run.preflight.examples import check_samples as check_samples
from jaxdist.run.preflight.learning_rates import check_rates as check_rates
from jaxdist.run.preflight.losses_and_metrics import check as check
from jaxdist.run.preflight.losses_and_metrics import check_forms as check_forms
from jaxdist.run.preflight.losses_and_metrics import check_order as check_order
from jaxdist.run.preflight.optimizer_updates import check_groups as check_groups
from jaxdist.run.preflight.optimizer_updates import check_update as check_update
from jaxdist.run.preflight.setting_values import check_settings as check_settings
from jaxdist.run.preflight.summed_state import check_state as check_state
