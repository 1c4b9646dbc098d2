import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxdist.checkpoint import orbax_trees


def test_what_is_saved_is_read_and_orbax_itself_opens_it(tmp_path):
    tree = {"a": {"b": jnp.arange(6.0).reshape(2, 3)}, "c": jnp.ones((), jnp.bfloat16)}
    orbax_trees.save(tmp_path / "tree", tree)
    found = orbax_trees.read(tmp_path / "tree")
    assert isinstance(found["a"]["b"], np.ndarray)
    with ocp.StandardCheckpointer() as checkpointer:
        opened = checkpointer.restore(tmp_path / "tree")
    for each in (found, opened):
        assert np.array_equal(each["a"]["b"], tree["a"]["b"])
        assert each["c"] == tree["c"]
