import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from small_problem import init_params, place

from jaxdist import adapters, losses, testing
from jaxdist.models import gpt, vit
from jaxdist.spmd import layout as layouts
from jaxdist.spmd import state as states
from jaxdist.spmd import strategies
from jaxdist.spmd.mesh import make_mesh

P = PartitionSpec


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_replicated_lays_everything_out_whole():
    assert layouts.replicated("params/w", leaf(64, 64)) == P()


@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "a/b", "b/a", ""]), min_size=1, max_size=3), min_size=1, max_size=4)
)
def test_two_leaves_of_one_name_are_refused(paths):
    tree = {}
    for *folders, last in paths:
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                return
        place[last] = leaf(2)
    names = [layouts.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    if len(set(names)) == len(names):
        layouts.specs(tree, make_mesh(), layouts.replicated)
    else:
        with pytest.raises(ValueError, match="two are called"):
            layouts.specs(tree, make_mesh(), layouts.replicated)


def test_zero1_cuts_the_optimizer_state_alone():
    layout = layouts.zero1(make_mesh())
    assert layout("opt_state/0/mu/w", leaf(64, 32)) == P("data")
    assert layout("params/w", leaf(64, 32)) == P()
    assert layout("model_state/w", leaf(64, 32)) == P()


def test_fsdp_cuts_params_and_optimizer_state_alike():
    layout = layouts.fsdp(make_mesh())
    for path in ("params/w", "opt_state/0/mu/w"):
        assert layout(path, leaf(32, 64)) == P(None, "data")
    assert layout("model_state/w", leaf(32, 64)) == P()
    assert layout("step", leaf()) == P()


@given(st.lists(st.integers(1, 40), max_size=4), st.integers(1, 2000))
def test_fsdp_cuts_the_largest_dim_that_divides_or_none(shape, min_size):
    spec = layouts.fsdp(make_mesh(), min_size=min_size)("params/w", leaf(*shape))
    dividing = [length for length in shape if length % 8 == 0]
    cut = [shape[dim] for dim, axis in enumerate(spec) if axis is not None]
    assert cut == ([max(dividing)] if dividing and np.prod(shape) >= min_size else [])


def test_fsdp_says_once_how_many_large_leaves_it_cannot_cut():
    layout, tree = layouts.fsdp(make_mesh()), {"params": {"w": leaf(101, 33), "v": leaf(64, 64)}}
    with pytest.warns(UserWarning, match=r"params/w of shape \(101, 33\) stays whole .* is divisible by 8"):
        assert layouts.specs(tree, make_mesh(), layout)["params"]["w"] == P()
    layouts.specs(tree, make_mesh(), layout)  # which warns of nothing
    tree = {"params": {str(number): leaf(101, 33) for number in range(300)}}
    for whole in (layouts.fsdp(make_mesh()), layouts.by_path([("none", P())], otherwise=layouts.fsdp(make_mesh()))):
        with pytest.warns(
            UserWarning, match=r"^300 leaves, such as params/\d+ of shape \(101, 33\), stay whole"
        ) as told:
            layouts.specs(tree | {"none": leaf(3)}, make_mesh(), whole)
        assert len(told) == 1


def test_the_first_rule_found_in_a_path_decides():
    layout = layouts.by_path([("out/kernel", P("model")), ("kernel", P(None, "model"))], otherwise=lambda *_: P("data"))
    assert layout("params/out/kernel", leaf(8, 8)) == P("model")
    assert layout("opt_state/0/nu/in/kernel", leaf(8, 8)) == P(None, "model")
    assert layout("opt_state/0/v_row/in/kernel", leaf(8)) == P("data")
    assert layout("params/in/bias", leaf(8)) == P("data")


TREE = {"params": {"dense": {"kernel": leaf(12, 30), "bias": leaf(30)}}}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("kernal", P("model")),
         r"nothing matches 'kernal'.*nearest to 'kernal' is params/dense/kernel of shape \(12, 30\)"),
        (("kernel", P(None, "model")), r"kernel of shape \(12, 30\).*dim 1 has length 30, which is not divisible by 4.*"
         r"mesh axis 'model'. Shard dim 0 instead or make the dim 28 or 32"),
        (("bias", P(None, "model")), r"params/dense/bias has shape \(30,\), but its spec .* at most 1"),
        (("kernel", P("modle")), r"spec of params/dense/kernel names the mesh axis 'modle', but the mesh has"),
        (("kernel", P(None, ("data", "model"))), "is not divisible by 8"),
        (("kernel", P("model", "model")), r"dense/kernel of shape \(12, 30\).* names the mesh axis 'model' twice"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_followed_names_leaf_shape_axis_and_remedy(rule, message):
    mesh = make_mesh({"data": 2, "model": 4})
    with pytest.raises(ValueError, match=message):
        layouts.shardings(TREE, mesh, layouts.by_path([rule]))


def test_axes_of_one_device_are_in_no_sharding():
    """The compiler leaves them out of a step's results, for which the step would be compiled a second time."""
    specs = [P(None, "model"), P(("data", "model")), P("model", "data")]
    rules = layouts.by_path(list(zip("abc", specs, strict=True)))
    tree = {name: leaf(8, 8) for name in "abc"}
    for sizes, expected in (((2, 1), [P(), P("data"), P(None, "data")]), ((1, 1), [P()] * 3), ((2, 2), specs)):
        mesh = make_mesh(dict(zip(("data", "model"), sizes, strict=True)), devices=jax.devices()[: sizes[0] * sizes[1]])
        found = layouts.shardings(tree, mesh, rules)
        for name, spec in zip("abc", expected, strict=True):
            assert found[name].is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), 2)
            assert {axis for axis in layouts.spec_axes(found[name].spec) if mesh.shape[axis] == 1} == set()


def test_an_axis_the_mesh_has_not_is_refused_before_any_leaf():
    with pytest.raises(ValueError, match="names the mesh axis 'fsdp', but the mesh has"):
        layouts.fsdp(make_mesh(), axis="fsdp")


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (gpt.GPT(32, 8, num_layers=1, num_heads=2, width=16), jnp.zeros((1, 8), jnp.int32)),
        (vit.ViT(10, 4, num_layers=1, num_heads=2, width=16), jnp.zeros((1, 8, 8, 1))),
    ],
)
def test_the_ready_rules_cut_each_branch_by_columns_then_rows(model, example):
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), example, train=False))
    layout = layouts.by_path(layouts.transformer_rules())
    specs = layouts.specs(variables, make_mesh({"data": 2, "model": 4}), layout)["params"]["block_0"]
    assert specs["attention"]["qkv"]["kernel"] == specs["mlp_in"]["kernel"] == P(None, "model")
    assert specs["attention"]["out"]["kernel"] == specs["mlp_out"]["kernel"] == P("model", None)
    assert specs["mlp_in"]["bias"] == P("model")
    assert specs["mlp_out"]["bias"] == P()


class Named(nn.Module):
    """One dim named by a mesh axis, one by a logical name, and biases without names."""

    @nn.compact
    def __call__(self, image, *, train):
        direct = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
        logical = nn.with_logical_partitioning(nn.initializers.normal(), ("hidden", "embed"))
        x = nn.tanh(nn.Dense(16, kernel_init=direct, name="direct")(image))
        return nn.Dense(8, kernel_init=logical, name="logical")(x)


class NamedNnx(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        direct = nnx.with_partitioning(nnx.initializers.normal(), (None, "model"))
        logical = nnx.with_partitioning(nnx.initializers.normal(), ("hidden", "embed"))
        self.direct = nnx.Linear(8, 16, kernel_init=direct, rngs=rngs)
        self.logical = nnx.Linear(16, 8, kernel_init=logical, rngs=rngs)

    def __call__(self, image):
        return self.logical(nnx.tanh(self.direct(image)))


IMAGES = {
    "image": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32),
    "label": np.arange(16, dtype=np.int32) % 8,
}


@pytest.mark.parametrize("module", [Named(), NamedNnx], ids=["linen", "nnx"])
def test_names_that_flax_modules_give_their_dims_are_honoured(module):
    """In params and optimizer state; and a step gives the numbers of plain replicas."""
    functions = adapters.from_model(module, losses.classification, IMAGES)
    named = strategies.build("tensor", mesh_axes={"data": 2, "model": 4}, names={"hidden": "model"})
    optimizer = optax.sgd(0.1, momentum=0.9)
    trained = []
    for strategy in (named, strategies.build("data-parallel")):
        state = states.create_state(functions.init_fn, optimizer, mesh=strategy.mesh, seed=0, layout=strategy.layout)
        if strategy is named:
            places = {place.path: place.spec for place in layouts.places(state)}
            for tree in ("params", "opt_state/0/trace"):
                assert places[f"{tree}/direct/kernel"] == P(None, "model")
                assert places[f"{tree}/logical/kernel"] == P("model", None)
                assert places[f"{tree}/logical/bias"] == P()
        state, _ = strategy.make_step(functions.loss_fn, optimizer)(state, place(IMAGES, strategy.mesh, "data"))
        trained.append(jax.device_get(state.params))
    testing.assert_trees_close(*trained, tolerance=1e-6)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"hiden": "model"}, "'hiden' is not one. Did you mean 'hidden'.* They are 'embed', 'hidden', 'model'"),
        ({"hidden": "model", "embed": "model"}, r"params/logical/kernel of shape \(16, 8\).*axis 'model' twice"),
    ],
)
def test_a_name_that_cannot_be_followed_says_why(names, message):
    functions = adapters.from_model(Named(), losses.classification, IMAGES)
    strategy = strategies.build("tensor", mesh_axes={"data": 2, "model": 4}, names=names)
    with pytest.raises(ValueError, match=message):
        states.abstract_state(functions.init_fn, optax.sgd(0.1), mesh=strategy.mesh, layout=strategy.layout)


def test_describe_tells_leaf_shape_spec_and_bytes_of_every_leaf():
    mesh = make_mesh()
    layout = layouts.fsdp(mesh, min_size=8)
    for state in (
        states.create_state(init_params, optax.adam(0.1), mesh=mesh, seed=0, layout=layout),
        states.abstract_state(init_params, optax.adam(0.1), mesh=mesh, layout=layout),
    ):
        lines = layouts.describe(state).splitlines()
        assert len(lines) == len(jax.tree.leaves(state)) + 2
        (first,) = [line.split() for line in lines if line.startswith("params/first")]
        assert first == ["params/first", "8x16", "float32", "-,", "data", "64"]
        (bias,) = [line.split() for line in lines if line.startswith("params/bias")]
        assert bias == ["params/bias", "3", "float32", "replicated", "12"]
        (key,) = [line.split() for line in lines if line.startswith("key")]
        assert key[-1] == "8"
    total = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(state_data(mesh, layout)) for shard in leaf.addressable_shards
    )
    assert lines[-1].split() == ["total", f"{total // 8:,}"]


def state_data(mesh, layout):
    state = states.create_state(init_params, optax.adam(0.1), mesh=mesh, seed=0, layout=layout)
    return jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf, state
    )
