"""A table and a number to predict: 442 patients in a Parquet file, trained until R2 on held-out patients is 0.45.

Linear regression reaches about the same. The score is logged beside the loss, and the stop rule looks at it.
jaxdist train experiments/diabetes.py --devices 2    (needs the extra "data")
"""

import pathlib

import example_files
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import sklearn.datasets
from flax import linen as nn

import jaxdist
from jaxdist import losses

TARGET_MEAN, TARGET_DEVIATION = 152.0, 77.0


class Regression(nn.Module):
    """One hidden layer, one number for each example."""

    width: int = 16
    """Features of the hidden layer."""

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool) -> jax.Array:
        """Return (B,) for features (B, F)."""
        return nn.Dense(1)(nn.tanh(nn.Dense(self.width)(features)))[:, 0]


def write_tables(folder: pathlib.Path) -> None:
    """Write patients.parquet."""
    table = sklearn.datasets.load_diabetes(scaled=False)
    columns = dict(zip(table.feature_names, table.data.T)) | {"target": table.target}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "patients.parquet")


def to_features(example: dict[str, np.ndarray], random: np.random.Generator) -> dict[str, np.ndarray]:
    """Return `features` float32 (10,), centred and scaled by round numbers, and `target`, of mean 0 and deviation 1."""
    values = {name: float(value) for name, value in example.items()}
    target = (values.pop("target") - TARGET_MEAN) / TARGET_DEVIATION
    centred = [(values[name] - centre) / scale for name, (centre, scale) in SCALES.items()]
    return {"features": np.array(centred, np.float32), "target": np.float32(target)}


SCALES = {
    "age": (48, 13),
    "sex": (1.5, 0.5),
    "bmi": (26, 4.4),
    "bp": (95, 14),
    "s1": (189, 35),
    "s2": (115, 30),
    "s3": (50, 13),
    "s4": (4.1, 1.3),
    "s5": (4.6, 0.5),
    "s6": (91, 11.5),
}


def get_config() -> jaxdist.Experiment:
    folder = example_files.written_once("diabetes-1", write_tables)
    train, held_out = jaxdist.data.held_out(jaxdist.data.ParquetSource(folder), 0.25, seed=1)
    return jaxdist.Experiment(
        model=Regression(),
        loss=losses.SquaredError(),
        inputs="features",
        data=jaxdist.Data(train=train, eval=held_out, example_fn=to_features, eval_example_fn=to_features),
        optimizer=jaxdist.Optimizer(name="adamw", learning_rate=1e-2, weight_decay=1e-2),
        global_batch_size=32,
        stop=jaxdist.Stop(target_metric="eval/r2", target=0.45, max_epochs=60),
        eval=jaxdist.Evaluation(metrics=(losses.R2(),)),
    )


if __name__ == "__main__":
    jaxdist.main(__file__)
