"""The tables cover every leaf once, and conversions move values without changing one, whatever the sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.models import gpt, hugging_face, resnet, vit
from jaxdist.spmd.layout import path_name


def leaves_of(model, inputs):
    """Return the leaves of a model by name, with numbers that are all different."""
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, train=False))
    trees = {"params": variables["params"]}
    if "batch_stats" in variables:
        trees["model_state"] = {"batch_stats": variables["batch_stats"]}
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}
    return {name: np.arange(np.prod(shape, dtype=int), dtype=np.int64).reshape(shape) for name, shape in shapes.items()}


def check_table(model, inputs):
    leaves = leaves_of(model, inputs)
    found = hugging_face.correspondence(model)
    assert sorted(each.ours for each in found.table) == sorted(leaves)
    theirs = [name for each in found.table for name in each.theirs]
    assert len(set(theirs)) == len(theirs)
    for each in found.table:
        parts = each.to_theirs(leaves[each.ours])
        assert len(parts) == len(each.theirs)
        assert np.array_equal(each.to_ours(*parts), leaves[each.ours]), each.ours
        assert sorted(np.concatenate([part.ravel() for part in parts])) == list(range(leaves[each.ours].size))


HEADS = st.integers(1, 3)
FEW = settings(max_examples=8)


@FEW
@given(layers=st.integers(1, 2), heads=HEADS, features=st.integers(1, 3), tied=st.booleans())
def test_the_table_of_gpt(layers, heads, features, tied):
    model = gpt.GPT(5, 4, num_layers=layers, num_heads=heads, width=heads * features, tie_embeddings=tied)
    check_table(model, jnp.zeros((1, 4), jnp.int32))


@FEW
@given(layers=st.integers(1, 2), heads=HEADS, features=st.integers(1, 3))
def test_the_table_of_vit(layers, heads, features):
    check_table(vit.ViT(3, 2, num_layers=layers, num_heads=heads, width=heads * features), jnp.zeros((1, 4, 4, 3)))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("sizes", [(1,), (1, 2), (2, 1, 1)])
def test_the_table_of_resnet(block, sizes):
    model = resnet.ResNet(3, sizes, block, width=2, symmetric_padding=True)
    check_table(model, jnp.zeros((1, 16, 16, 3)))


def test_a_config_names_what_transformers_needs_to_build_the_model():
    model = gpt.GPT(5, 4, num_layers=1, num_heads=1, width=2, dropout_rate=0.1)
    config = hugging_face.config_of(model, {})
    assert (config["model_type"], config["vocab_size"], config["layer_norm_epsilon"]) == ("gpt2", 5, 1e-6)
    assert (config["resid_pdrop"], config["attn_pdrop"]) == (0.1, 0.0)
