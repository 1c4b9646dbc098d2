"""Text: a GPT on the bytes of the Python library's own source; target 3.25 bits a byte.

jaxdist train experiments/bytes_gpt.py --devices 2
"""

import pathlib
import sysconfig

import numpy as np

import jaxdist
from jaxdist import losses
from jaxdist.models import gpt

CONTEXT_LENGTH = 128
MAX_BYTES = 4 << 20


def load_windows() -> tuple[jaxdist.ArraySource, jaxdist.ArraySource]:
    """Return training and held-out windows, `tokens` int32 (CONTEXT_LENGTH,): every tenth file is held out."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [[file for i, file in enumerate(files) if (i % 10 == 9) == held_out] for held_out in (False, True)]
    return tuple(_windows(part) for part in parts)


def _windows(files: list[pathlib.Path]) -> jaxdist.ArraySource:
    text = b"".join(file.read_bytes() for file in files)[:MAX_BYTES]
    tokens = np.frombuffer(text, np.uint8)[: len(text) // CONTEXT_LENGTH * CONTEXT_LENGTH]
    return jaxdist.ArraySource({"tokens": tokens.reshape(-1, CONTEXT_LENGTH).astype(np.int32)})


def get_config() -> jaxdist.Experiment:
    train, held_out = load_windows()
    return jaxdist.Experiment(
        model=gpt.GPT(vocab_size=256, context_length=CONTEXT_LENGTH, num_layers=2, num_heads=4, width=64),
        loss=losses.next_token,
        inputs="tokens",
        data=jaxdist.Data(train=train, eval=held_out),
        optimizer=jaxdist.Optimizer(
            name="adamw",
            learning_rate=3e-3,
            weight_decay=0.1,
            clip_norm=1.0,
            schedule=jaxdist.Schedule(name="cosine", warmup=20, length=400, final_fraction=0.1),
        ),
        global_batch_size=32,
        stop=jaxdist.Stop(target_metric="eval/bits_per_byte", target=3.25, mode="min", max_steps=400),
        eval=jaxdist.Evaluation(every_steps=100),
    )


if __name__ == "__main__":
    jaxdist.main(__file__)
