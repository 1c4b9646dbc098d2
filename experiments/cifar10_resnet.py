"""Images: a ResNet-18 for 32 x 32 on CIFAR-10 as TensorFlow Datasets has prepared it; target 93 %.

tfds build cifar10 --file_format=array_record     (once, with internet access)
jaxdist train experiments/cifar10_resnet.py

It is meant for accelerators. Where the data set is not prepared, the message says how to prepare it.
"""

import jaxdist
from jaxdist import data, losses
from jaxdist.models import resnet

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of the channels of the training images."""


def get_config() -> jaxdist.Experiment:
    train, held_out = (
        data.TfdsSource("cifar10", split=split, fields=("image", "label")) for split in ("train", "test")
    )
    normalise = data.Normalise(mean=MEAN, std=STD)
    return jaxdist.Experiment(
        model=resnet.ResNet(num_classes=10, stage_sizes=(2, 2, 2, 2), small_images=True),
        loss=losses.classification,
        data=jaxdist.Data(
            train=train,
            eval=held_out,
            example_fn=data.Chain((data.RandomCrop(32, 32, padding=4), data.RandomFlip(), normalise)),
            eval_example_fn=normalise,
        ),
        optimizer=jaxdist.Optimizer(
            name="momentum",
            learning_rate=0.1,
            weight_decay=5e-4,
            schedule=jaxdist.Schedule(name="cosine", warmup=1, length=30, unit="epochs"),
        ),
        global_batch_size=128,
        stop=jaxdist.Stop(target=0.93, max_epochs=30),
    )


if __name__ == "__main__":
    jaxdist.main(__file__)
