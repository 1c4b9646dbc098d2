"""Text: a GPT on tokens of a byte-level BPE that is trained on the Python library's source; target 2.6 bits a byte.

jaxdist train experiments/bpe_gpt.py --devices 2    (needs the extra "text")
"""

import json
import pathlib
import sysconfig

import example_files

import jaxdist
from jaxdist import losses
from jaxdist.data import prepare
from jaxdist.models import gpt

CONTEXT_LENGTH = 64


def write_tokens(folder: pathlib.Path) -> None:
    """Write train/ and test/: tokens of the library's modules, every tenth held out; one tokenizer for both."""
    files = [path for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) if path.stat().st_size]
    parts = [[str(file) for i, file in enumerate(files) if (i % 10 == 9) == held_out] for held_out in (False, True)]
    prepare.prepare_text(parts[0], folder / "train", "bpe:1024")
    prepare.prepare_text(parts[1], folder / "test", str(folder / "train" / "tokenizer.json"))


def get_config() -> jaxdist.Experiment:
    folder = example_files.written_once("python-source-bpe-1", write_tokens)
    notes = json.loads((folder / "test" / "prepared.json").read_text())
    train, held_out = (jaxdist.data.TokenSource(folder / part, length=CONTEXT_LENGTH) for part in ("train", "test"))
    return jaxdist.Experiment(
        model=gpt.GPT(notes["vocab_size"], CONTEXT_LENGTH, num_layers=2, num_heads=4, width=64),
        loss=losses.NextToken(bytes_per_token=notes["bytes_per_token"]),
        inputs="tokens",
        data=jaxdist.Data(train=train, eval=held_out),
        optimizer=jaxdist.Optimizer(
            name="adamw",
            learning_rate=3e-3,
            weight_decay=0.1,
            clip_norm=1.0,
            schedule=jaxdist.Schedule(name="cosine", warmup=20, length=600, final_fraction=0.1),
        ),
        global_batch_size=32,
        stop=jaxdist.Stop(target_metric="eval/bits_per_byte", target=2.6, mode="min", max_steps=600),
        eval=jaxdist.Evaluation(every_steps=100),
    )


if __name__ == "__main__":
    jaxdist.main(__file__)
