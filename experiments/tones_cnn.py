"""Sound: WAV files of four wave forms in noise, told apart by a small CNN on their spectrograms; target 95 %.

The files are made here: half a second of a sine, square, sawtooth or triangle wave at a random pitch and loudness.
jaxdist train experiments/tones_cnn.py --devices 2    (needs the extra "data")
"""

import pathlib
from collections.abc import Callable

import example_files
import numpy as np
import scipy.io.wavfile
import scipy.signal

import jaxdist
from jaxdist import losses
from jaxdist.models import cnn

RATE, NUM_SAMPLES = 8000, 4000
WAVES = {
    "sawtooth": scipy.signal.sawtooth,
    "sine": np.sin,
    "square": scipy.signal.square,
    "triangle": lambda phase: scipy.signal.sawtooth(phase, width=0.5),
}


def write_sounds(folder: pathlib.Path) -> None:
    """Write train/WAVE/NUMBER.wav, 150 of each, and test/WAVE/NUMBER.wav, 50 of each: 16 bits, 8 kHz."""
    random = np.random.default_rng(0)
    for part, count in (("train", 150), ("test", 50)):
        for name, wave in WAVES.items():
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                samples = (_noisy_tone(wave, random) * 32767).astype(np.int16)
                scipy.io.wavfile.write(folder / part / name / f"{number:03}.wav", RATE, samples)


def _noisy_tone(wave: Callable[[np.ndarray], np.ndarray], random: np.random.Generator) -> np.ndarray:
    pitch, start, loudness = 110 * 2 ** random.uniform(0, 2), random.uniform(0, 6.28), random.uniform(0.1, 0.5)
    tone = loudness * wave(2 * np.pi * pitch * np.arange(NUM_SAMPLES) / RATE + start)
    return np.clip(tone + random.normal(scale=0.05, size=NUM_SAMPLES), -1, 1)


def to_image(example: dict[str, np.ndarray], random: np.random.Generator) -> dict[str, np.ndarray]:
    """Return `image` float32 (frames, frequencies, 1), a log spectrogram of about unit scale, and `label`."""
    spectrogram = jaxdist.data.Spectrogram(window=256, hop=128)(example, random)["audio"]
    return {"image": spectrogram[..., None] / 4, "label": example["label"]}


def get_config() -> jaxdist.Experiment:
    folder = example_files.written_once("tones-1", write_sounds)
    train = jaxdist.data.SoundFolder(folder / "train", num_samples=NUM_SAMPLES)
    held_out = jaxdist.data.SoundFolder(folder / "test", num_samples=NUM_SAMPLES, classes=train.classes)
    return jaxdist.Experiment(
        model=cnn.CNN(num_classes=4, width=8, batch_norm=True),
        loss=losses.classification,
        data=jaxdist.Data(train=train, eval=held_out, example_fn=to_image, eval_example_fn=to_image),
        optimizer=jaxdist.Optimizer(name="adamw", learning_rate=3e-3, weight_decay=1e-3),
        global_batch_size=32,
        stop=jaxdist.Stop(target=0.95, max_epochs=20),
    )


if __name__ == "__main__":
    jaxdist.main(__file__)
