"""The smallest experiment that has everything: two classes, ragged batches, dropout, held-out data. Tests change it.

52 examples in batches of 16 are 4 steps an epoch, the last of them with 4 true examples; 21 are held out.
"""

import numpy as np

import jaxdist
from jaxdist import losses
from jaxdist.models import mlp

NUM_TRAIN, NUM_HELD_OUT, NUM_FEATURES = 52, 21, 6


def make_source(num_examples: int, seed: int) -> jaxdist.ArraySource:
    random = np.random.default_rng(seed)
    features = random.normal(size=(num_examples, NUM_FEATURES)).astype(np.float32)
    labels = (features[:, 0] + features[:, 1] > 0).astype(np.int32)
    return jaxdist.ArraySource({"image": features, "label": labels})


def get_config() -> jaxdist.Experiment:
    return jaxdist.Experiment(
        name="tiny",
        model=mlp.MLP(num_classes=2, width=8, num_layers=1, dropout_rate=0.1),
        loss=losses.classification,
        data=jaxdist.Data(train=make_source(NUM_TRAIN, 0), eval=make_source(NUM_HELD_OUT, 1), num_threads=0),
        optimizer=jaxdist.Optimizer(name="momentum", learning_rate=0.1),
        global_batch_size=16,
        stop=jaxdist.Stop(max_steps=10),
        checkpoints=jaxdist.Checkpoints(every_steps=4),
        guards=jaxdist.Guards(check_replicas_every=0),
        log_every=1,
        writers=("jsonl",),
    )


if __name__ == "__main__":
    jaxdist.main(__file__)
