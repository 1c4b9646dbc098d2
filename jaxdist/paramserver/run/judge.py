"""The training state of a cut, and its evaluation."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist import optimizers
from jaxdist.data import Loader
from jaxdist.paramserver.protocol import effects
from jaxdist.paramserver.run.shared_plan import Plan
from jaxdist.run import components
from jaxdist.spmd import evaluate
from jaxdist.spmd.state import TrainState


def train_state(
    plan: Plan, step: int, leaves: Sequence[np.ndarray], opt_leaves: Sequence[np.ndarray] | None
) -> TrainState:
    """Return the training state with these leaves after `step`, on the first device of this process.

    Without `opt_leaves` its opt_state is None, which is enough for an evaluation.
    """
    params, model_state = jax.tree.unflatten(plan.structure, leaves)
    opt_state = None
    if opt_leaves is not None:
        opt_state = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(plan.optimizer.init, params)), opt_leaves)
    key = plan.run_keys().train
    return jax.device_put(
        TrainState(jnp.asarray(step, jnp.int32), params, model_state, opt_state, key), jax.local_devices()[0]
    )


class Judge:
    """Builds and evaluates the training state of a cut."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._step = evaluate.eval_step(plan.functions.eval_fn)
        self._loaders = components.make_eval_loaders(plan.experiment)
        self._collecting = components.make_collecting(
            plan.experiment,
            plan.functions,
            lambda eval_fn, collect_fn: evaluate.step_with_rows(self._step, evaluate.collect_step(collect_fn)),
        )

    @functools.cached_property
    def needs_opt_state(self) -> bool:
        """Whether the optimizer's state holds the params that are evaluated."""
        leaves = [jax.ShapeDtypeStruct(*each) for each in zip(self.plan.sharding.shapes, self.plan.sharding.dtypes)]
        params, _ = jax.tree.unflatten(self.plan.structure, leaves)
        return optimizers.keeps_average(jax.eval_shape(self.plan.optimizer.init, params))

    def state(self, cut: effects.CutRead) -> TrainState:
        """Return the training state of a cut, with what was read of it."""
        opt_leaves = self.plan.optimizer_sharding().join(cut.opt_state) if cut.opt_state else None
        return train_state(self.plan, cut.offer.step, self.plan.sharding.join(cut.params), opt_leaves)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Return the metrics on the held-out data, of the averaged params if the optimizer keeps them."""
        params = components.params_in_use(state)

        def evaluate_set(loader: Loader) -> dict[str, float]:
            batches = (jax.device_put(batch) for batch, _ in loader)
            return evaluate.evaluate(self._step, params, state.model_state, batches, self._collecting)

        return components.of_all_sets({name: evaluate_set(loader) for name, loader in self._loaders.items()})
