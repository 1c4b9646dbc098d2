"""Utilization: the formula by hand, FLOPs of a step by hand, and what is not known left out."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_experiment

import jaxdist
from jaxdist.models import mlp
from jaxdist.plan import chips
from jaxdist.run import attempt, components
from jaxdist.run.diagnosis import utilization

KNOWN = {
    "examples_per_second": 1000.0,
    "global_batch_size": 50,
    "num_devices": 4,
    "tokens_per_example": 128,
    "flops_per_step": 6e12,
    "peak": 1e15,
}


def test_the_formula_is_flops_a_second_over_the_peak_of_all_devices():
    found = utilization.throughput(**KNOWN)
    assert found["examples_per_second_per_device"] == 250
    assert found["tokens_per_second_per_device"] == 32_000
    steps_per_second = 1000 / 50
    assert found["model_flops_utilization"] == pytest.approx(6e12 * steps_per_second / (4 * 1e15))


@pytest.mark.parametrize("unknown", ["examples_per_second", "flops_per_step", "peak"])
def test_what_is_not_known_is_none(unknown):
    assert utilization.throughput(**(KNOWN | {unknown: None}))["model_flops_utilization"] is None


def test_tokens_are_rows_of_whole_numbers():
    fields = {
        "image": jax.ShapeDtypeStruct((8, 28, 28), np.float32),
        "label": jax.ShapeDtypeStruct((8,), np.int32),
        "tokens": jax.ShapeDtypeStruct((8, 64), np.int32),
    }
    assert utilization.tokens_per_example(fields, "image") is None
    assert utilization.tokens_per_example(fields, ("image", "tokens")) == 64


def test_peaks_are_of_the_chips_that_are_planned_for():
    planned = [*chips.TPUS.values(), *(gpu.chip for gpu in chips.GPUS.values())]
    assert {chip.flops_per_second for chip in planned} <= set(utilization.PEAKS.values())
    assert {gpu.title: gpu.chip.flops_per_second for gpu in chips.GPUS.values()}.items() <= utilization.PEAKS.items()
    assert all(100e12 < peak < 5e15 for peak in utilization.PEAKS.values())
    assert utilization.peak_of(jax.devices()[0]) is None


@pytest.mark.parametrize(("reduction", "counted"), [("mean", True), ("canonical", False)])
def test_the_flops_of_a_step_are_those_of_its_matrix_products(reduction, counted):
    experiment = dataclasses.replace(tiny_experiment.get_config(), reduction=reduction)
    found = utilization.flops_of(components.put_together(experiment, devices=jax.devices()[:2]))
    features, width, classes = 6, 8, 2
    # Forward; the backward pass has each weight's gradient, and that of the hidden features.
    products = 2 * features * width + 2 * width * classes + width * classes
    norm_of_the_gradient = features * width + width + width * classes + classes  # on each of the two devices
    assert found == (2.0 * 16 * products + 2.0 * 2 * norm_of_the_gradient if counted else None)


def test_a_run_on_a_chip_with_a_known_peak_records_its_utilization(tmp_path, monkeypatch):
    monkeypatch.setitem(utilization.PEAKS, jax.devices()[0].device_kind, 1e9)
    experiment = tiny_experiment.get_config()
    experiment = dataclasses.replace(
        experiment,
        stop=jaxdist.Stop(max_steps=2),
        model=mlp.MLP(num_classes=2, width=8, num_layers=1),
        data=dataclasses.replace(experiment.data, eval=None),
    )
    attempt.train(experiment, attempt.RunOptions(run_dir=tmp_path, silent=True), devices=jax.devices()[:1])
    found = json.loads((tmp_path / "run.json").read_text())
    made = found["throughput"]
    assert made["flops_per_step"] == 4756
    assert made["examples_per_second_per_device"] == found["examples_per_second"]
    assert made["model_flops_utilization"] == pytest.approx(4756 / 16 * found["examples_per_second"] / 1e9)
