"""The training state of a cut, and its evaluation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist import data, optimizers
from jaxdist.paramserver.protocol import journal
from jaxdist.paramserver.run.shared_plan import Plan
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

    def state(self, cut: journal.Cut) -> TrainState:
        """Return the training state of a cut."""
        leaves = self.plan.sharding.join([answer.pieces for answer in cut.shards])
        opt_leaves = self.plan.cut().join([answer.opt_state for answer in cut.shards])
        return train_state(self.plan, cut.step, leaves, opt_leaves)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Return `eval/...` metrics, of the averaged params where the optimizer keeps them; none without data."""
        experiment = self.plan.experiment
        source = experiment.data.eval
        if source is None:
            return {}
        loader = data.Loader(
            source,
            global_batch_size=experiment.global_batch_size,
            seed=experiment.seed,
            shuffle=False,
            num_epochs=1,
            example_fn=experiment.data.eval_example_fn,
            num_threads=0,
            on_bad=experiment.data.on_bad,
        )
        averaged = optimizers.ema_params(state.opt_state)
        params = state.params if averaged is None else averaged
        batches = (jax.device_put(batch) for batch, _ in loader)
        found = evaluate.evaluate(self._step, params, state.model_state, batches)
        return {f"eval/{name}": value for name, value in found.items()}
