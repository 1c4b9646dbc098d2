"""What the processes of a job are told of a model: the shapes that each would have traced."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen
from two_processes import TwoProcesses

from jaxdist import adapters, losses
from jaxdist.adapters.initial_shapes import InitialShapes
from jaxdist.spmd import state
from jaxdist.spmd.mesh import make_mesh

BATCH = {"image": jax.ShapeDtypeStruct((4, 6), jnp.float32), "label": jax.ShapeDtypeStruct((4,), jnp.int32)}


class Model(linen.Module):
    normed: bool = False
    boxed: bool = False
    traced = 0

    @linen.compact
    def __call__(self, image, *, train, mask=None):
        Model.traced += 1
        init = linen.initializers.lecun_normal()
        dense = linen.Dense(
            3, param_dtype=jnp.bfloat16, kernel_init=linen.with_partitioning(init, (None, "x")) if self.boxed else init
        )
        return linen.BatchNorm(use_running_average=not train)(dense(image), mask=mask) if self.normed else dense(image)


def shapes_of(module, initial, mesh):
    functions = adapters.from_model(module, losses.classification, BATCH, is_checked=True, initial=initial)
    return state.abstract_state(initial.alike(functions.init_fn), optax.adam(0.1), mesh=mesh)


@pytest.mark.parametrize("module", [Model(), Model(normed=True)])
def test_one_process_traces_the_model_and_the_others_have_the_state_that_it_finds(module, monkeypatch):
    mesh, job = make_mesh({"data": -1}), TwoProcesses(monkeypatch)
    with job.run(0):
        expected = shapes_of(module, InitialShapes(mesh), mesh)
    monkeypatch.setattr(Model, "traced", 0)
    with job.run(1):
        assert shapes_of(module, InitialShapes(mesh), mesh) == expected
    assert Model.traced == 0
    assert (expected.model_state is not None) == module.normed


def test_params_in_boxes_are_traced_by_each(monkeypatch):
    mesh, job = make_mesh({"data": -1}), TwoProcesses(monkeypatch)
    found = []
    for process in (0, 1):
        with job.run(process):
            monkeypatch.setattr(Model, "traced", 0)
            found.append(shapes_of(Model(boxed=True), InitialShapes(mesh), mesh))
            assert Model.traced
    assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])


def test_without_a_mesh_nothing_is_told(monkeypatch):
    job = TwoProcesses(monkeypatch)
    with job.run(0):
        shapes_of(Model(), InitialShapes(), make_mesh({"data": -1}))
    assert not job.kept
