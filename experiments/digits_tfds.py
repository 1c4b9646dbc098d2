"""The digits of scikit-learn from a TFDS data set that is prepared on first use: no download, no TensorFlow.

jaxdist train experiments/digits_tfds.py --devices 4
"""

import digits_builder

import jaxdist
from jaxdist import data, losses
from jaxdist.models import cnn

SHADES = 16.0  # pixels are whole numbers from 0 to 16


def get_config() -> jaxdist.Experiment:
    folder = digits_builder.prepare()
    train, held_out = (data.TfdsSource(folder, split=split, fields=("image", "label")) for split in ("train", "test"))
    scale = data.Normalise(scale=SHADES)
    return jaxdist.Experiment(
        model=cnn.CNN(num_classes=10, width=16),
        loss=losses.classification,
        data=jaxdist.Data(train=train, eval=held_out, example_fn=scale, eval_example_fn=scale),
        optimizer=jaxdist.Optimizer(name="adamw", learning_rate=2e-3, weight_decay=1e-4),
        global_batch_size=64,
        stop=jaxdist.Stop(target=0.985, max_epochs=60),
    )


if __name__ == "__main__":
    jaxdist.main(__file__)
