"""Images: a residual network on scikit-learn's digits, each shifted by a random pixel at every visit; target 98.5 %.

jaxdist train experiments/digits_resnet.py --devices 2
"""

import digits_cnn

import jaxdist
from jaxdist import losses
from jaxdist.models import resnet


def get_config() -> jaxdist.Experiment:
    train, held_out = digits_cnn.load_digits()
    return jaxdist.Experiment(
        model=resnet.ResNet(num_classes=10, stage_sizes=(1, 1), width=16, small_images=True),
        loss=losses.Classification(label_smoothing=0.1),
        data=jaxdist.Data(train=train, eval=held_out, example_fn=jaxdist.data.RandomCrop(8, 8, padding=1)),
        optimizer=jaxdist.Optimizer(
            name="adamw",
            learning_rate=5e-3,
            weight_decay=1e-3,
            schedule=jaxdist.Schedule(name="cosine", length=20, unit="epochs", final_fraction=0.05),
        ),
        global_batch_size=64,
        stop=jaxdist.Stop(target=0.985, max_epochs=30),
    )


if __name__ == "__main__":
    jaxdist.main(__file__)
