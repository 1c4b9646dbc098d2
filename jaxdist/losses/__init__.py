"""Losses that give one value per example or per token, so that the mean over a batch can weight each one exactly.

Each is `loss(outputs, batch) -> (values, metrics)`, the form that `jaxdist.adapters` takes: `values` is what training
minimises, `metrics` maps a name to values of the same shape. Nothing is averaged here. Logits may have any float dtype;
everything is computed in float32, because a sum over many classes in bfloat16 loses the small ones. Losses with
settings are frozen dataclasses, so that the run record shows the settings.

Metrics that are not means over examples (F1, the area under the ROC curve, R2, ...) are in `collected`.
"""

from jaxdist.losses.classes import Classification as Classification
from jaxdist.losses.classes import classification as classification
from jaxdist.losses.collected import F1 as F1
from jaxdist.losses.collected import R2 as R2
from jaxdist.losses.collected import ConfusionMatrix as ConfusionMatrix
from jaxdist.losses.collected import Perplexity as Perplexity
from jaxdist.losses.collected import RocAuc as RocAuc
from jaxdist.losses.labels import BinaryClassification as BinaryClassification
from jaxdist.losses.regression import AbsoluteError as AbsoluteError
from jaxdist.losses.regression import Huber as Huber
from jaxdist.losses.regression import SquaredError as SquaredError
from jaxdist.losses.targets import Values as Values
from jaxdist.losses.tokens import NextToken as NextToken
from jaxdist.losses.tokens import next_token as next_token
from jaxdist.losses.whole_batch import WholeBatch as WholeBatch

# Run records name a loss by its module, and `jaxdist.load` compares that name: it must stay when files are split.
classification.__module__ = next_token.__module__ = __name__
