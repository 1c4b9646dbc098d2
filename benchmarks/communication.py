"""Bytes held and sent per device and step by each strategy, read off the compiled step of a GPT on 8 fake devices.

python benchmarks/communication.py [--json] [--docs docs/layouts.md]
"""

import argparse
import json
import pathlib

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from jaxdist import adapters, collectives, losses, strategies  # noqa: E402
from jaxdist import state as states  # noqa: E402
from jaxdist.models import gpt  # noqa: E402

NUM_DEVICES = 8
STRATEGIES = (
    ("data-parallel", None, 2.0),
    ("zero1", None, 2.0),
    ("fsdp", None, 3.0),
    ("hsdp", {"data": 2, "fsdp": 4}, None),
    ("tensor", {"data": 2, "model": 4}, None),
)
"""(strategy, mesh, textbook passes over the params: sent bytes are passes * M * (n - 1) / n)."""

EXAMPLES, LENGTH = 16, 32
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def measure(name: str, mesh_axes: dict[str, int] | None) -> dict[str, float]:
    strategy = strategies.build(name, mesh_axes=mesh_axes)
    shape = jax.ShapeDtypeStruct((EXAMPLES, LENGTH), jnp.int32)
    model = gpt.GPT(256, LENGTH, num_layers=2, num_heads=8, width=128)
    functions = adapters.linen(model, losses.next_token, {"tokens": shape}, inputs="tokens")
    state = states.abstract_state(functions.init_fn, OPTIMIZER, mesh=strategy.mesh, layout=strategy.layout)
    sharding = NamedSharding(strategy.mesh, PartitionSpec(strategy.batch_axes))
    batch = {"tokens": jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)}
    step = strategy.make_step(functions.loss_fn, OPTIMIZER)
    lowered = jax.jit(lambda state, batch: step(state, batch), donate_argnums=0).lower(state, batch)
    # On CPU, XLA drops barriers early and then merges the two gathers of a param, which accelerators keep apart.
    program = lowered.compile(compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"})
    found = collectives.collectives(program.as_text())
    return {
        "param_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params)),
        "argument_bytes": program.memory_analysis().argument_size_in_bytes,
        "sent_bytes": collectives.sent_bytes(found),
        "collectives": {kind: number for kind, (number, _) in collectives.summarize(found).items()},
    }


def rows() -> list[dict]:
    measured = []
    for name, mesh_axes, passes in STRATEGIES:
        row = measure(name, mesh_axes)
        textbook = None if passes is None else passes * row["param_bytes"] * (NUM_DEVICES - 1) / NUM_DEVICES
        ratio = None if textbook is None else row["sent_bytes"] / textbook
        shown = name if mesh_axes is None else f"{name} {mesh_axes}"
        report = {"name": f"communication/{shown}", "ours": row["sent_bytes"], "theirs": textbook, "ratio": ratio}
        how = {"unit": "bytes sent per device and step", "repeats": 1, "versions": {"jax": jax.__version__}}
        measured.append({**report, **how, **row})
    return measured


def table(measured: list[dict]) -> str:
    whole = measured[0]
    lines = [
        "| strategy | state and batch held, of data-parallel | sent, in params | against the textbook | collectives |"
    ]
    lines.append("|---|---|---|---|---|")
    for row in measured:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        held = row["argument_bytes"] / whole["argument_bytes"]
        kinds = ", ".join(f"{number} {kind}" for kind, number in row["collectives"].items())
        name = row["name"].removeprefix("communication/")
        lines.append(f"| {name} | {held:.3f} | {row['sent_bytes'] / row['param_bytes']:.3f} | {ratio} | {kinds} |")
    return "\n".join(lines)


DOCS = """# What each strategy holds and sends

For one device and one step, read off the compiled program of a small GPT with AdamW and clipping on {devices} devices
(jax {version}); "in params" is in units of the size of all params. The textbook: an all-reduce of M bytes over n
devices sends 2 M (n-1)/n, ZeRO's first stage the same (reduce-scatter, then all-gather), FSDP half as much again. A
param that the backward pass does not need (an embedding) is gathered once only, which is why FSDP sends a little less.

{table}

Made by `python benchmarks/communication.py --docs docs/layouts.md`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--docs", type=pathlib.Path, metavar="FILE", help="write the table as a page of the docs")
    options = parser.parse_args()
    measured = rows()
    if options.json:
        print("\n".join(json.dumps(row) for row in measured))
    else:
        print(table(measured))
    if options.docs:
        page = DOCS.format(devices=NUM_DEVICES, version=jax.__version__, table=table(measured))
        options.docs.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
