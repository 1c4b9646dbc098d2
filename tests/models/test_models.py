"""Properties of every reference model: shapes, published sizes, dtypes, dropout by key, equal numbers under remat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdist.models import cnn, gpt, mlp, resnet, vit

IMAGES = jax.random.normal(jax.random.key(7), (2, 8, 8, 1))
TOKENS = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])
SMALL_GPT = gpt.GPT(11, 4, num_layers=1, num_heads=2, width=8)
SMALL_VIT = vit.ViT(5, 4, num_layers=1, num_heads=2, width=8)
SMALL_RESNET = resnet.ResNet(5, (1, 1), "bottleneck", width=4, small_images=True)
MODELS = {
    "mlp": (mlp.MLP(5, width=8), IMAGES, (2, 5)),
    "cnn": (cnn.CNN(5, width=2, num_stages=1, batch_norm=True), IMAGES, (2, 5)),
    "resnet": (SMALL_RESNET, IMAGES, (2, 5)),
    "vit": (SMALL_VIT, IMAGES, (2, 5)),
    "gpt": (SMALL_GPT, TOKENS, (2, 4, 11)),
}
DROPOUT = ["mlp", "cnn", "vit", "gpt"]
REMAT = ["resnet", "vit", "gpt"]


def random_variables(model, inputs):
    """Variables of the model's shapes, all random: an initial zero (bias, scale) would hide what stands behind it."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, train=False))
    random = np.random.default_rng(1)
    # Positive, as a variance must be.
    return jax.tree.map(lambda leaf: jnp.asarray(random.uniform(0.1, 0.5, leaf.shape), leaf.dtype), shapes)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_have_the_promised_shape(name):
    model, inputs, shape = MODELS[name]
    assert jax.eval_shape(lambda v: model.apply(v, inputs, train=False), random_variables(model, inputs)).shape == shape


@pytest.mark.parametrize(
    ("model", "inputs", "published"),
    [
        (resnet.resnet18(), jnp.zeros((1, 224, 224, 3)), 11_689_512),
        (resnet.resnet50(), jnp.zeros((1, 224, 224, 3)), 25_557_032),
        (vit.vit_b16(), jnp.zeros((1, 224, 224, 3)), 86_567_656),
        (gpt.gpt2_small(), jnp.zeros((1, 1024), jnp.int32), 124_439_808),
    ],
    ids=["resnet18", "resnet50", "vit_b16", "gpt2_small"],
)
def test_the_parameter_count_is_the_published_one(model, inputs, published):
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, train=False))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == published


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_params_and_inputs_are_not_upcast(name, train):
    model, inputs, _ = MODELS[name]

    def low(leaf):
        return leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    variables = random_variables(model, inputs)
    variables = {**variables, "params": jax.tree.map(low, variables["params"])}

    def apply(variables, inputs):
        return model.apply(variables, inputs, train=train, rngs=jax.random.key(0), mutable=["batch_stats"])[0]

    closed = jax.make_jaxpr(apply)(variables, low(inputs))
    assert closed.out_avals[0].dtype == jnp.bfloat16
    products = [equation for equation in _equations(closed.jaxpr) if equation.primitive.name in _MATRIX_PRODUCTS]
    assert products
    for equation in products:
        assert {operand.aval.dtype for operand in equation.invars} == {jnp.dtype(jnp.bfloat16)}, equation


_MATRIX_PRODUCTS = {"dot_general", "conv_general_dilated"}


def _equations(jaxpr):
    """Every equation of a jaxpr, those of inner ones too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
            elif hasattr(inner, "jaxpr"):
                yield from _equations(inner.jaxpr)


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_changes_with_the_key_and_is_off_in_evaluation(name):
    model, inputs, _ = MODELS[name]
    model = model.clone(dropout_rate=0.5)
    variables = random_variables(model, inputs)

    def outputs(train):
        def apply(key):
            return model.apply(variables, inputs, train=train, rngs={"dropout": key}, mutable=["batch_stats"])[0]

        compiled = jax.jit(apply)
        return [np.asarray(compiled(jax.random.key(seed))) for seed in (1, 1, 2)]

    first, again, other = outputs(train=True)
    assert (first == again).all()
    assert not np.allclose(first, other)
    first, _, other = outputs(train=False)
    assert (first == other).all()


@pytest.mark.parametrize(
    "name", [name if name == "gpt" else pytest.param(name, marks=pytest.mark.soak) for name in REMAT]
)
def test_remat_computes_activations_again_and_gives_the_same_gradient(name):
    model, inputs, _ = MODELS[name]
    if name in DROPOUT:  # the second computation must draw the same dropout
        model = model.clone(dropout_rate=0.2)
    variables = random_variables(model, inputs)

    def gradient(remat):
        def loss(params):
            outputs, statistics = model.clone(remat=remat).apply(
                {**variables, "params": params},
                inputs,
                train=True,
                rngs={"dropout": jax.random.key(0)},
                mutable=["batch_stats"],
            )
            return jnp.square(outputs).sum(), statistics

        return jax.grad(loss, has_aux=True)

    params = variables["params"]
    primitives = [
        {equation.primitive.name for equation in _equations(jax.make_jaxpr(gradient(remat))(params).jaxpr)}
        for remat in (False, True)
    ]
    assert "remat2" in primitives[1] - primitives[0]
    plain, again = (jax.jit(gradient(remat))(params) for remat in (False, True))
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain[0]) if leaf.size > 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), again, plain)
