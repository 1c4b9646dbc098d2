"""Small reference models in Flax, each in a file of its own; import the file: `from jaxdist.models import cnn`.

They are written in Linen, because a Linen module is a frozen dataclass: its hyperparameters are fields that a config
file holds, that print, compare and hash, and that `--set model.width=64` can replace. `cnn_nnx` is the same CNN in NNX.

Every model is called as `model(inputs, train=...)`, takes a `mask` of true rows where it has batch normalisation, and
computes in the dtype of the params and inputs that it is given; only statistics (softmax, normalisation) are float32.
"""
