"""What all sides train: arrays, first weights and sizes, by NumPy alone, so that every framework can read them."""

import dataclasses
import itertools
import pathlib
import sysconfig

import numpy as np
import sklearn.datasets

LEARNING_RATE = 1e-3
"""Of Adam with betas 0.9 and 0.999 and epsilon 1e-8, on all sides."""


@dataclasses.dataclass(frozen=True)
class Work:
    """A model's sizes and its batches."""

    batch_size: int
    width: int
    num_layers: int = 2
    num_heads: int = 0
    context_length: int = 0
    units: int = 1
    """What an example counts for in the rate: 1, or its tokens."""


WORKS = {
    "mlp": Work(batch_size=64, width=128),
    "cnn": Work(batch_size=256, width=24),
    "gpt": Work(batch_size=16, width=256, num_layers=4, num_heads=8, context_length=128, units=128),
}
NUM_BATCHES = 5
FOLDER, WORK = "PEER_FOLDER", "PEER_WORK"


def make_arrays(name: str) -> dict[str, np.ndarray]:
    """Return the examples: images float32 (N, 8, 8, 1) and labels int32, or tokens int32 (N, context)."""
    work = WORKS[name]
    count = NUM_BATCHES * work.batch_size
    if name == "gpt":
        files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = b"".join(file.read_bytes() for file in files)[: count * work.context_length]
        return {"tokens": np.frombuffer(text, np.uint8).reshape(count, -1).astype(np.int32)}
    digits = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))[:count]
    images = (digits.images[order, ..., None] / 16).astype(np.float32)
    return {"image": images, "label": digits.target[order].astype(np.int32)}


def make_weights(name: str) -> dict[str, np.ndarray]:
    """Return the first weights, float32, by the names that Flax gives them."""
    work, random = WORKS[name], np.random.default_rng(1)

    def normal(scale: float, *shape: int) -> np.ndarray:
        return (scale * random.standard_normal(shape)).astype(np.float32)

    def dense(path: str, inputs: int, outputs: int, scale: float | None = None) -> dict[str, np.ndarray]:
        kernel = normal(inputs**-0.5 if scale is None else scale, inputs, outputs)
        return {f"{path}/kernel": kernel, f"{path}/bias": np.zeros(outputs, np.float32)}

    w = work.width
    if name == "mlp":
        return dense("Dense_0", 64, w) | dense("Dense_1", w, w) | dense("Dense_2", w, 10)
    if name == "cnn":
        channels, found = [1, w, w, 2 * w, 2 * w], dense("Dense_0", 2 * 2 * 2 * w, 10)
        for index, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
            found[f"Conv_{index}/kernel"] = normal((9 * inputs) ** -0.5, 3, 3, inputs, outputs)
            found[f"Conv_{index}/bias"] = np.zeros(outputs, np.float32)
        return found
    found = {
        "token_embedding/embedding": normal(0.02, 256, w),
        "position_embedding": normal(0.02, work.context_length, w),
    }
    norms = ["final_norm"]
    for index in range(work.num_layers):
        block = f"block_{index}"
        found |= dense(f"{block}/attention/qkv", w, 3 * w, 0.02) | dense(f"{block}/attention/out", w, w, 0.007)
        found |= dense(f"{block}/mlp_in", w, 4 * w, 0.02) | dense(f"{block}/mlp_out", 4 * w, w, 0.007)
        norms += [f"{block}/attention_norm", f"{block}/mlp_norm"]
    for norm in norms:
        found |= {f"{norm}/scale": np.ones(w, np.float32), f"{norm}/bias": np.zeros(w, np.float32)}
    return found
