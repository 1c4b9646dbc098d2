"""A table: 569 biopsies as CSV files, 30 numbers each and a diagnosis in words; trained until 96 % are told right.

jaxdist train experiments/breast_cancer.py --devices 2    (needs the extra "data")
"""

import csv
import pathlib

import example_files
import numpy as np
import sklearn.datasets

import jaxdist
from jaxdist import losses
from jaxdist.models import mlp


def write_tables(folder: pathlib.Path) -> None:
    """Write train.csv and test.csv; the two diagnoses have equal parts in both."""
    table = sklearn.datasets.load_breast_cancer()
    names = [name.replace(" ", "_") for name in table.feature_names]
    rows = jaxdist.ArraySource({"row": np.arange(len(table.target))})
    parts = jaxdist.data.held_out(rows, 0.25, seed=0, labels=table.target)
    for name, part in zip(("train", "test"), parts):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, "diagnosis"])
            writer.writerows([*table.data[id_], table.target_names[table.target[id_]]] for id_ in part.ids)


def load_tables() -> tuple[jaxdist.ArraySource, jaxdist.ArraySource]:
    """Return training and held-out rows: `features` float32 (30,), scaled by the training rows; `label` int32."""
    folder = example_files.written_once("breast-cancer-1", write_tables)
    train = jaxdist.data.csv_source(folder / "train.csv", categories=["diagnosis"])
    # The texts of the training rows number those of the others: a class has one number everywhere.
    held_out = jaxdist.data.csv_source(folder / "test.csv", categories=train.vocabulary)
    numbers = [name for name in train.arrays if name != "diagnosis"]
    columns = [np.stack([table.arrays[name] for name in numbers], axis=1) for table in (train, held_out)]
    mean, deviation = columns[0].mean(axis=0), columns[0].std(axis=0)
    return tuple(
        jaxdist.ArraySource(
            {
                "features": ((values - mean) / deviation).astype(np.float32),
                "label": table.arrays["diagnosis"].astype(np.int32),
            }
        )
        for values, table in zip(columns, (train, held_out))
    )


def get_config() -> jaxdist.Experiment:
    train, held_out = load_tables()
    return jaxdist.Experiment(
        model=mlp.MLP(num_classes=2, width=32, num_layers=1, dropout_rate=0.2),
        loss=losses.classification,
        inputs="features",
        data=jaxdist.Data(train=train, eval=held_out),
        optimizer=jaxdist.Optimizer(name="adamw", learning_rate=3e-3, weight_decay=1e-2),
        global_batch_size=32,
        stop=jaxdist.Stop(target=0.96, max_epochs=60),
        eval=jaxdist.Evaluation(metrics=(losses.F1(), losses.RocAuc(), losses.ConfusionMatrix(num_classes=2))),
    )


if __name__ == "__main__":
    jaxdist.main(__file__)
