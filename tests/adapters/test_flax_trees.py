"""Flax's own trees become plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import serialization

from jaxdist import adapters, errors


def test_boxes_are_taken_off_and_arrays_are_the_same():
    kernel = jnp.arange(6.0).reshape(2, 3)
    boxed = {"a": nn.Partitioned(kernel, ("in", "out")), "b": jnp.ones(2)}
    plain = adapters.unboxed(boxed)
    assert jax.tree.structure(plain) == jax.tree.structure({"a": 0, "b": 0})
    assert plain["a"] is kernel


def test_a_msgpack_file_gives_its_tree_and_another_file_is_named():
    tree = {"dense": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    content = serialization.to_bytes(tree)
    np.testing.assert_array_equal(
        adapters.from_msgpack(content, "w.msgpack")["dense"]["kernel"], tree["dense"]["kernel"]
    )
    with pytest.raises(errors.UserError, match=r"w.msgpack is no whole file of flax.serialization.to_bytes"):
        adapters.from_msgpack(content[:-3], "w.msgpack")
