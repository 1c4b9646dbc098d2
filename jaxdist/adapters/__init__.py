"""Flax modules, Linen or NNX, as the plain functions that a training step takes.

The one idea: a module is turned into functions of (params, batch, key, model_state) once, at the rim, and everything
behind it sees pytrees of arrays only. No folder but this one and `jaxdist.models` imports Flax.

A module is called as `module(*inputs)`, where the inputs are batch fields. One that takes `train` gets True in training
and False in evaluation; a switch of another name is refused, since it would keep its default. One that takes `mask`
gets the batch's mask as booleans of shape (B,), or None, so that batch normalisation can leave padding rows out. One
that takes `segment_ids` gets the field of that name, which packed rows have, so that attention keeps their examples
apart.

Every module is traced once when its functions are made, at two batch sizes: what can be known to be wrong is refused
there.
"""

from jaxdist.adapters.any_model import check_model as check_model
from jaxdist.adapters.any_model import from_model as from_model
from jaxdist.adapters.coupled_examples import are_coupled as are_coupled
from jaxdist.adapters.flax_trees import from_msgpack as from_msgpack
from jaxdist.adapters.flax_trees import unboxed as unboxed
from jaxdist.adapters.functions import Functions as Functions
from jaxdist.adapters.functions import Loss as Loss
from jaxdist.adapters.functions import Values as Values
from jaxdist.adapters.linen_modules import linen as linen
from jaxdist.adapters.nnx_modules import nnx as nnx
