"""The small training runs that rates are measured with: dense layers, a language model, a vision transformer, a CNN."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdist import losses
from jaxdist.config.experiment import Data, Experiment
from jaxdist.data import ArraySource
from jaxdist.models import cnn, gpt, mlp, resnet, vit
from jaxdist.optimizers import Optimizer
from jaxdist.stop import Stop

_CLASSES = 8
_RATE = 1e-5
"""Low, so that the numbers stay of ordinary size: denormal ones are slow to compute with."""


def experiments(num_devices: int) -> Sequence[Experiment]:
    """Return the experiments; batches divide over the devices, and over several also the params are sharded."""
    whole = [make(num_devices) for make in _MAKERS]
    if num_devices == 1:
        return whole
    return [*whole, *(_dense(512, 3, 256, 512)(num_devices, strategy) for strategy in ("zero1", "fsdp"))]


def _dense(width: int, layers: int, batch: int, features: int) -> Callable[..., Experiment]:
    def make(num_devices: int, strategy: str = "data-parallel") -> Experiment:
        model = mlp.MLP(num_classes=_CLASSES, width=width, num_layers=layers, dropout_rate=0.0)
        count = _divisible(batch, num_devices)
        fields = {"image": _noise(count, features), "label": np.arange(count, dtype=np.int32) % _CLASSES}
        return _experiment(f"mlp {width}x{layers}", model, fields, losses.classification, "image", strategy)

    return make


def _text(width: int, layers: int, length: int, batch: int) -> Callable[[int], Experiment]:
    def make(num_devices: int) -> Experiment:
        shape = (_divisible(batch, num_devices), length)
        fields = {"tokens": np.random.default_rng(0).integers(0, 64, shape, np.int32)}
        model = gpt.GPT(64, length, num_layers=layers, num_heads=4, width=width)
        return _experiment(f"gpt {width}x{layers}x{length}", model, fields, losses.next_token, "tokens")

    return make


def _images(name: str, model: Any, side: int, batch: int) -> Callable[[int], Experiment]:
    def make(num_devices: int) -> Experiment:
        count = _divisible(batch, num_devices)
        fields = {"image": _noise(count, side, side, 3), "label": np.arange(count, dtype=np.int32) % _CLASSES}
        return _experiment(name, model, fields, losses.classification, "image")

    return make


def _vit(width: int, layers: int) -> Any:
    return vit.ViT(_CLASSES, 4, num_layers=layers, num_heads=4, width=width)


_MAKERS = (
    _dense(256, 1, 128, 256), _dense(512, 3, 256, 512), _dense(1024, 2, 128, 256), _dense(128, 6, 512, 128),
    _dense(2048, 1, 64, 512), _dense(640, 6, 192, 256), _dense(256, 8, 2560, 64),
    _dense(384, 2, 128, 192), _dense(1280, 1, 96, 128), _dense(128, 3, 64, 64), _dense(192, 5, 256, 96),
    _text(64, 2, 64, 8), _text(128, 1, 128, 6), _text(64, 1, 128, 8), _text(48, 2, 32, 16),
    _images("vit 64x2", _vit(64, 2), 32, 16), _images("vit 128x1", _vit(128, 1), 32, 12),
    _images("vit 96x1", _vit(96, 1), 16, 24),
    _images("cnn 32", cnn.CNN(num_classes=_CLASSES), 16, 32), _images("cnn 16", cnn.CNN(_CLASSES, width=16), 16, 64),
    _images("cnn 20", cnn.CNN(_CLASSES, width=20), 12, 48),
    _images("resnet 32", resnet.ResNet(_CLASSES, (1, 1), width=32), 16, 32),
    _images("resnet basic", resnet.ResNet(_CLASSES, (1, 1), "basic", width=24), 16, 24),
)  # fmt: skip


def _experiment(
    name: str, model: Any, fields: dict[str, np.ndarray], loss: Any, inputs: str, strategy: str = "data-parallel"
) -> Experiment:
    return Experiment(
        name=f"{name}, {strategy}",
        model=model,
        loss=loss,
        inputs=inputs,
        data=Data(train=ArraySource(fields), num_threads=0),
        optimizer=Optimizer(name="adam", learning_rate=_RATE),
        global_batch_size=len(fields[inputs]),
        strategy=strategy,
        stop=Stop(max_steps=1),
    )


def _divisible(batch: int, num_devices: int) -> int:
    return -(-batch // num_devices) * num_devices


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)
