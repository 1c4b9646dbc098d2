"""Sizes that no model can have are refused when it is made, by the name of the setting."""

import pytest

from jaxdist.models import cnn, cnn_nnx, gpt, mlp, resnet, vit

MAKERS = {
    "mlp": lambda **changes: mlp.MLP(**{"num_classes": 2} | changes),
    "cnn": lambda **changes: cnn.CNN(**{"num_classes": 2} | changes),
    "cnn_nnx": lambda **changes: cnn_nnx.CNN(**{"num_classes": 2} | changes),
    "resnet": lambda **changes: resnet.ResNet(**{"num_classes": 2, "stage_sizes": (1,)} | changes),
    "vit": lambda **changes: vit.ViT(
        **{"num_classes": 2, "patch_size": 2, "num_layers": 1, "num_heads": 1, "width": 4} | changes
    ),
}


@pytest.mark.parametrize("value", [0, -3, 2.0, "2", True])
@pytest.mark.parametrize("name", ["width", "num_classes"])
@pytest.mark.parametrize("model", sorted(MAKERS))
def test_sizes_that_are_none_are_refused_by_name(model, name, value):
    with pytest.raises(ValueError, match=rf"{name} is a whole number of at least 1; got "):
        MAKERS[model](**{name: value})


def test_layers_may_be_none_and_dropout_is_a_probability():
    assert mlp.MLP(num_classes=2, num_layers=0).num_layers == 0
    with pytest.raises(ValueError, match="num_layers is a whole number of at least 0; got -1"):
        mlp.MLP(num_classes=2, num_layers=-1)
    for rate in (-0.1, 1, 2.0, float("nan")):
        with pytest.raises(ValueError, match=r"dropout_rate is the probability .* below 1; got "):
            gpt.GPT(vocab_size=8, context_length=4, num_layers=1, num_heads=1, width=4, dropout_rate=rate)
