"""Bytes held and sent per device and step by each strategy, read off the compiled step of a GPT on 8 fake devices.

python benchmarks/communication.py [--json] [--docs docs/layouts.md]

"theirs" is what the textbook says that a ring sends; see `textbook`.
"""

import argparse
import functools
import json
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist import adapters, losses
from jaxdist.models import gpt
from jaxdist.plan.compiled import collectives
from jaxdist.spmd import layout as layouts
from jaxdist.spmd import state as states
from jaxdist.spmd import strategies

NUM_DEVICES = 8
EXAMPLES, LENGTH, NUM_LAYERS, WIDTH = 128, 32, 2, 128
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


class Case(NamedTuple):
    strategy: str
    mesh_axes: dict[str, int] | None = None
    remat: bool = False

    def __str__(self) -> str:
        mesh = "" if self.mesh_axes is None else " " + json.dumps(self.mesh_axes)
        return f"{self.strategy}{mesh}{', remat' if self.remat else ''}"


CASES = (
    Case("data-parallel"),
    Case("data-parallel", remat=True),
    Case("zero1"),
    Case("fsdp"),
    Case("fsdp", {"data": 2, "fsdp": 4}),
    Case("tensor", {"data": 2, "model": 4}),
)


@functools.cache
def rows() -> list[dict[str, Any]]:
    """Return one row a case, the keys of every benchmark first."""
    return [row(case) for case in CASES]


def row(case: Case) -> dict[str, Any]:
    strategy = strategies.build(case.strategy, mesh_axes=case.mesh_axes, devices=jax.devices()[:NUM_DEVICES])
    program, state = compile_step(strategy, remat=case.remat)
    memory, found = program.memory_analysis(), collectives.collectives(program.as_text())
    ours, theirs = collectives.sent_bytes(found), textbook(case, state)
    return {
        "name": f"communication/{case}",
        "ours": ours,
        "theirs": theirs,
        "ratio": ours / theirs,
        "unit": "bytes sent per device and step",
        "repeats": 1,
        "versions": {"jax": jax.__version__},
        "whole_param_bytes": whole_bytes(state.params),
        "param_bytes": device_bytes(state.params),
        "opt_state_bytes": device_bytes(state.opt_state),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": {kind: number for kind, (number, _) in collectives.summarize(found).items()},
    }


def compile_step(strategy: strategies.Strategy, *, remat: bool) -> tuple[Any, states.TrainState]:
    """Return the compiled step of the GPT, and its abstract state."""
    shape = jax.ShapeDtypeStruct((EXAMPLES, LENGTH), jnp.int32)
    model = gpt.GPT(256, LENGTH, NUM_LAYERS, num_heads=8, width=WIDTH, remat=remat)
    functions = adapters.linen(model, losses.next_token, {"tokens": shape}, inputs="tokens")
    state = states.abstract_state(functions.init_fn, OPTIMIZER, mesh=strategy.mesh, layout=strategy.layout)
    sharding = NamedSharding(strategy.mesh, PartitionSpec(strategy.batch_axes))
    batch = {"tokens": jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)}
    step = strategy.make_step(functions.loss_fn, OPTIMIZER)
    lowered = jax.jit(lambda state, batch: step(state, batch), donate_argnums=0).lower(state, batch)
    # On CPU, XLA drops barriers early and then merges the two gathers of a param, which accelerators keep apart.
    return lowered.compile(compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"}), state


def textbook(case: Case, state: states.TrainState) -> float:
    """Return the bytes that one device sends in a ring: M (n-1)/n to gather or to scatter M bytes over n devices.

    An all-reduce is both. Data parallelism all-reduces the gradients. ZeRO's first stage scatters them, and gathers
    the params. FSDP gathers the params twice and scatters the gradients, inside a group where there are several; the
    groups then all-reduce a shard. Tensor parallelism all-reduces the activations of each branch of each block, forward
    and backward, and over the data axis the gradients of what a device holds.
    """
    param_bytes = whole_bytes(state.params)
    axes = case.mesh_axes or {"data": NUM_DEVICES}
    if case.strategy == "tensor":
        activation_bytes = EXAMPLES // axes["data"] * LENGTH * WIDTH * 4
        all_reduces = 4 * NUM_LAYERS * _ring(2 * activation_bytes, axes["model"])
        return all_reduces + _ring(2 * device_bytes(state.params), axes["data"])
    if "fsdp" in axes:
        return _ring(3 * param_bytes, axes["fsdp"]) + _ring(2 * param_bytes / axes["fsdp"], axes["data"])
    return _ring({"data-parallel": 2, "zero1": 2, "fsdp": 3}[case.strategy] * param_bytes, axes["data"])


def _ring(num_bytes: float, num_devices: int) -> float:
    return num_bytes * (num_devices - 1) / num_devices


def whole_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
    return sum(place.device_bytes for place in layouts.places(tree))


def table(measured: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown; what is held in parts of what the first row holds."""
    titles = ["strategy", "params", "optimizer state", "state and batch", "temporaries", "sent, in params"]
    titles += ["sent, of the textbook", "collectives"]
    lines = [titles, ["---"] * len(titles)]
    for each in measured:
        held = ("param_bytes", "opt_state_bytes", "argument_bytes", "temporary_bytes")
        figures = [each[name] / measured[0][name] for name in held]
        figures += [each["ours"] / each["whole_param_bytes"], each["ratio"]]
        kinds = ", ".join(f"{number} {kind}" for kind, number in each["collectives"].items())
        name = f"`{each['name'].removeprefix('communication/')}`"
        lines.append([name, *(f"{figure:.3f}" for figure in figures), kinds])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


BEGIN, END = "<!-- made by benchmarks/communication.py -->\n", "\n<!-- end -->"


def page_with(measured: list[dict[str, Any]], page: str) -> str:
    """Return `page` with the table between the two comments made anew, and the version of JAX below it."""
    made = f"{BEGIN}{table(measured)}\n\njax {jax.__version__}, {NUM_DEVICES} devices{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: made, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--docs", type=pathlib.Path, metavar="FILE", help="make the table in a page of the docs anew")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    jax.config.update("jax_platforms", "cpu")
    print("\n".join(map(json.dumps, rows())) if options.json else table(rows()))
    if options.docs:
        options.docs.write_text(page_with(rows(), options.docs.read_text()))


if __name__ == "__main__":
    main()
