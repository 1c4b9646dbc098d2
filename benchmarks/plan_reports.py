"""The plans of three well-known models that the guide shows: GPT-2 124M, ViT-B/16 and ResNet-50.

python benchmarks/plan_reports.py [--out docs/plans] [--only gpt2_124m|gpt2_124m_256|vit_b16|resnet50]

Each is compiled for TPUs that are not present (extra `tpu`) and written as a page and as text.
"""

import argparse
import pathlib

import numpy as np

import jaxdist
from jaxdist import losses
from jaxdist.models import gpt, resnet, vit
from jaxdist.plan import estimate, topology
from jaxdist.plan.compiled import source_lines
from jaxdist.plan.showing import plan_page, plan_text

STEPS, PRICE_OF_A_CHIP = 100_000, 1.2
"""The steps of a run, and a price of one chip and hour that stands for whatever the reader pays."""
SMALL, LARGE = "tpu:v5e:2x4", "tpu:v5e:16x16"


def language(batch: int) -> jaxdist.Experiment:
    fields = {"tokens": np.zeros((batch, 1024), np.int32)}
    model = gpt.gpt2_small(dropout_rate=0.0)
    return experiment("gpt2_124m", model, fields, batch, losses.next_token, "tokens")


def vision(name: str, model: object, batch: int) -> jaxdist.Experiment:
    fields = {"image": np.zeros((batch, 224, 224, 3), np.float32), "label": np.zeros(batch, np.int32)}
    return experiment(name, model, fields, batch, losses.classification, "image")


def experiment(
    name: str, model: object, fields: dict[str, np.ndarray], batch: int, loss: object, inputs: str
) -> jaxdist.Experiment:
    return jaxdist.Experiment(
        name=name,
        model=model,
        loss=loss,
        inputs=inputs,
        data=jaxdist.Data(train=jaxdist.ArraySource(fields)),
        optimizer=jaxdist.Optimizer(name="adamw", learning_rate=3e-4),
        global_batch_size=batch,
        stop=jaxdist.Stop(max_steps=STEPS),
        precision="bfloat16",
    )


REPORTS = {
    "gpt2_124m": (SMALL, lambda: language(16)),
    "gpt2_124m_256": (LARGE, lambda: language(512)),
    "vit_b16": (SMALL, lambda: vision("vit_b16", vit.vit_b16(), 256)),
    "resnet50": (SMALL, lambda: vision("resnet50", resnet.resnet50(), 256)),
}


def write(name: str, folder: pathlib.Path) -> None:
    where, make = REPORTS[name]
    found = topology.find(where)
    with source_lines.kept():
        made = estimate.estimate(make(), found)
    price = PRICE_OF_A_CHIP * made.num_devices
    text = plan_text.render(made, price_per_hour=price)
    plan_page.write(plan_page.of_plan(made, text, price_per_hour=price), folder / f"{name}.html")
    (folder / f"{name}.txt").write_text(f"{text}\n", encoding="utf-8")
    print(f"{text}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/plans"))
    parser.add_argument("--only", choices=REPORTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in [options.only] if options.only else REPORTS:
        write(name, options.out)


if __name__ == "__main__":
    main()
