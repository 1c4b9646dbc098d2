"""A multi-layer perceptron on the handwritten digits: the smallest experiment.

jaxdist train experiments/digits_mlp.py --devices 2
"""

from digits_cnn import load_digits

import jaxdist
from jaxdist import losses
from jaxdist.models import mlp


def get_config() -> jaxdist.Experiment:
    train, held_out = load_digits()
    return jaxdist.Experiment(
        model=mlp.MLP(num_classes=10, width=128),
        loss=losses.classification,
        data=jaxdist.Data(train=train, eval=held_out),
        optimizer=jaxdist.Optimizer(name="momentum", learning_rate=0.05, clip_norm=1.0),
        global_batch_size=64,
        stop=jaxdist.Stop(target=0.96, max_epochs=40),
    )


if __name__ == "__main__":
    jaxdist.main(__file__)
