"""The training state of a cut, and its evaluation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.paramserver.protocol import journal
from jaxdist.paramserver.run.shared_plan import Plan
from jaxdist.run import components
from jaxdist.spmd import evaluate
from jaxdist.spmd.state import TrainState


def train_state(plan: Plan, step: int, leaves: Sequence[np.ndarray], opt_leaves: Sequence[np.ndarray]) -> TrainState:
    """Return the state that data-parallel training has after the same steps, on this process's first device."""
    params, model_state = jax.tree.unflatten(plan.structure, leaves)
    opt_state = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(plan.optimizer.init, params)), opt_leaves)
    key = plan.run_keys().train
    return jax.device_put(
        TrainState(jnp.asarray(step, jnp.int32), params, model_state, opt_state, key), jax.local_devices()[0]
    )


class Judge:
    """Looks at the state of a cut."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._step = evaluate.eval_step(plan.functions.eval_fn)
        self._loader = None if plan.experiment.data.eval is None else components.make_eval_loader(plan.experiment)

    def state(self, cut: journal.Cut) -> TrainState:
        """Return the training state of a cut."""
        leaves = self.plan.sharding.join([answer.pieces for answer in cut.shards])
        opt_leaves = self.plan.cut().join([answer.opt_state for answer in cut.shards])
        return train_state(self.plan, cut.step, leaves, opt_leaves)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Return the metrics on the held-out data; of the averaged params, where the optimizer keeps them."""
        assert self._loader is not None
        batches = (jax.device_put(batch) for batch, _ in self._loader)
        return evaluate.evaluate(self._step, components.params_in_use(state), state.model_state, batches)
