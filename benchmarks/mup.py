"""The best learning rate at widths 64 and 256, with muP (base width 64) and without: an MLP on the digits, a byte GPT.

The loss is the mean of the last fifth of the steps, over `--seeds` seeds. A grid point is a factor of 2.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import sys

import jax

import jaxdist
from jaxdist.config.loading import load_experiment
from jaxdist.launch.joining import runtime
from jaxdist.run.sweeps.shared_programs import SharedPrograms
from jaxdist.rundir import record

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
WIDTHS = (64, 256)
RATES = {"digits_mlp": [2.0**-k for k in range(12, 3, -1)], "bytes_gpt": [2.0**-k for k in range(11, 4, -1)]}
MODELS = {"digits_mlp": {"num_layers": 3}, "bytes_gpt": {"num_layers": 2, "num_heads": 4}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="*", default=["digits_mlp", "bytes_gpt"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(FOLDER))
    devices = runtime.start(1)
    for name in options.experiments:
        for base_width in (WIDTHS[0], None):
            row = measure(name, base_width, devices, options.steps, options.seeds)
            print(json.dumps(row) if options.json else show(row), flush=True)


def measure(name: str, base_width: int | None, devices: list[jax.Device], steps: int, seeds: int) -> dict:
    """Return the losses at every rate and width, and how many grid points the best rates are apart."""
    losses = {width: [] for width in WIDTHS}
    for width in WIDTHS:
        programs = SharedPrograms()
        for rate in RATES[name]:
            made = [make(name, width, base_width, rate, seed) for seed in range(seeds)]
            runs = [final_loss(programs, each, devices, steps) for each in made]
            losses[width].append(round(statistics.mean(runs), 4))
    best = [min(range(len(RATES[name])), key=losses[width].__getitem__) for width in WIDTHS]
    return {
        "name": f"mup/{name}/{'muP' if base_width else 'standard'}",
        "ours": best[1] - best[0],
        "theirs": 0,
        "ratio": None,
        "unit": "grid points (factors of 2) from the best rate at width 64 to that at 256",
        "rates": RATES[name],
        "losses": losses,
        "steps": steps,
        "repeats": seeds,
        "versions": record.versions(),
    }


def make(name: str, width: int, base_width: int | None, rate: float, seed: int) -> jaxdist.Experiment:
    """Return the experiment of one run: Adam at a constant rate."""
    experiment = load(name)
    return dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, width=width, base_width=base_width, **MODELS[name]),
        optimizer=jaxdist.Optimizer(name="adam", learning_rate=rate),
        global_batch_size=16 if name == "bytes_gpt" else 64,
        stop=jaxdist.Stop(max_steps=10_000),
        seed=seed,
    )


_loaded: dict[str, jaxdist.Experiment] = {}


def load(name: str) -> jaxdist.Experiment:
    """Return the experiment of a file, loaded once, so that its functions are the same objects."""
    if name not in _loaded:
        _loaded[name] = load_experiment(str(FOLDER / f"{name}.py"))
        data = dataclasses.replace(_loaded[name].data, eval=None)
        _loaded[name] = dataclasses.replace(_loaded[name], data=data)
    return _loaded[name]


def final_loss(
    programs: SharedPrograms, experiment: jaxdist.Experiment, devices: list[jax.Device], steps: int
) -> float:
    """Return the mean loss of the last fifth of the steps; a large number where it is not finite."""
    parts = programs.put_together(experiment, devices=devices)
    state, losses = parts.create_state(), []
    for (batch, _), number in zip(parts.batches(), range(steps)):
        state, metrics = parts.step(state, batch)
        if number >= steps - steps // 5:
            losses.append(metrics["loss"])
    mean = float(sum(losses) / len(losses))
    return mean if mean == mean else 1e9


def show(row: dict) -> str:
    """Return a row for people: the losses by rate, and the shift."""
    head = "  ".join(f"2^{round(math.log2(rate))}".rjust(7) for rate in row["rates"])
    lines = [f"{row['name']}: the best rate moves {row['ours']:+} grid points", f"{'':>10}{head}"]
    lines += [f"{width:>8}  {'  '.join(f'{loss:7.3f}' for loss in row['losses'][width])}" for width in WIDTHS]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
