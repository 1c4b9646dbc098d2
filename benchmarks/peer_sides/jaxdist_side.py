"""An experiment for `jaxdist train`, with a hook that waits for its turns."""

import os
import signal
from typing import Any

import flax_models
import turns
from works import LEARNING_RATE

import jaxdist
from jaxdist import losses


class Wait:
    """Waits between turns; ends the run as Ctrl-C does."""

    def __init__(self) -> None:
        self.turns: turns.Turns | None = None

    def on_step(self, info: Any) -> None:
        """See turns."""
        self.turns = self.turns or turns.Turns()
        if not self.turns.step(lambda: info.metrics):
            self.turns.tell(flax_models.loss_of(info.params))
            os.kill(os.getpid(), signal.SIGTERM)


class WriteTimes:
    """Writes down when steps ended."""

    def __init__(self) -> None:
        self.times: turns.Times | None = None

    def on_step(self, info: Any) -> None:
        """Wait for the step, then write."""
        self.times = self.times or turns.Times(os.environ[turns.STEPS])
        info.metrics  # noqa: B018 (reading waits)
        self.times.write(info.step)


def get_config() -> jaxdist.Experiment:
    return jaxdist.Experiment(
        model=flax_models.make_model(),
        loss=losses.next_token if flax_models.NAME == "gpt" else losses.classification,
        inputs=flax_models.INPUTS,
        data=jaxdist.Data(train=jaxdist.ArraySource(flax_models.load("arrays.npz")), shuffle=False),
        optimizer=jaxdist.Optimizer(name="adam", learning_rate=LEARNING_RATE),
        init_from=str(flax_models.HERE / "named_weights.npz"),
        global_batch_size=flax_models.SIZES.batch_size,
        stop=jaxdist.Stop(max_steps=10**9),
        hooks=(WriteTimes() if turns.STEPS in os.environ else Wait(),),
    )
