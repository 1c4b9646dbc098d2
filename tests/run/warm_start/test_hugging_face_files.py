"""Weights of transformers go in and out with equal bits and give equal logits, beside NumPy and, marked, torch."""

import dataclasses
import importlib
import json
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy_models
import pytest
import safetensors.numpy

import jaxdist
from jaxdist import errors
from jaxdist.models import gpt, hugging_face, mlp, resnet, vit
from jaxdist.run.use import exports
from jaxdist.run.warm_start import beginning, hugging_face_files
from jaxdist.spmd.state import InitialState

RANDOM = np.random.default_rng(0)
GPT = gpt.GPT(11, 8, num_layers=2, num_heads=2, width=12, norm_epsilon=1e-5)
VIT = vit.ViT(3, 4, num_layers=2, num_heads=2, width=12, norm_epsilon=1e-12, exact_gelu=True)
RESNET = resnet.ResNet(3, (1, 2), "bottleneck", width=4, symmetric_padding=True)
BASIC = resnet.ResNet(3, (2, 1), "basic", width=4, symmetric_padding=True)
TOKENS = RANDOM.integers(0, 11, (2, 7)).astype(np.int32)
IMAGES = RANDOM.normal(size=(2, 8, 8, 3)).astype(np.float32)
LARGE_IMAGES = RANDOM.normal(size=(2, 32, 32, 3)).astype(np.float32)

GPT_SHAPES = numpy_models.gpt2_shapes(vocabulary=11, positions=8, layers=2, width=12)
VIT_SHAPES = numpy_models.vit_shapes(layers=2, width=12, patch=4, patches=4, channels=3, classes=3)


def resnet_shapes(model):
    sizes = {"depths": model.stage_sizes, "width": model.width, "kind": model.block}
    return numpy_models.resnet_shapes(**sizes, channels=3, classes=3)


CASES = {
    "gpt": (GPT, TOKENS, GPT_SHAPES, lambda weights: numpy_models.gpt2(weights, TOKENS, layers=2, heads=2)),
    "vit": (VIT, IMAGES, VIT_SHAPES, lambda weights: numpy_models.vit(weights, IMAGES, layers=2, heads=2)),
    "resnet bottleneck": (
        RESNET,
        LARGE_IMAGES,
        resnet_shapes(RESNET),
        lambda weights: numpy_models.resnet(weights, LARGE_IMAGES, depths=(1, 2), kind="bottleneck"),
    ),
    "resnet basic": (
        BASIC,
        LARGE_IMAGES,
        resnet_shapes(BASIC),
        lambda weights: numpy_models.resnet(weights, LARGE_IMAGES, depths=(2, 1), kind="basic"),
    ),
}


def write_folder(folder, weights, config=None):
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def initial(model, inputs):
    def init():
        variables = model.init(jax.random.key(0), jnp.asarray(inputs[:1]), train=False)
        state = {name: value for name, value in variables.items() if name != "params"}
        return InitialState(variables["params"], state or None)

    return tuple(jax.eval_shape(init))


def experiment_of(model, path, **settings):
    weights = jaxdist.InitFrom(path=str(path), names="hugging-face", **settings)
    return types.SimpleNamespace(model=model, init_from=weights)


def load(model, inputs, path, **settings):
    """Return params and model_state that are loaded, and what was loaded."""
    shapes = initial(model, inputs)
    found = beginning.open_for(experiment_of(model, path, **settings), shapes)
    leaves = beginning.replace_leaves(found, jax.tree.leaves(shapes))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves), found


def logits_of(model, inputs, loaded):
    params, state = loaded
    return np.asarray(model.apply({"params": params, **(state or {})}, jnp.asarray(inputs), train=False))


def write_back(model, loaded, folder):
    trees = {"params": loaded[0]} | ({} if loaded[1] is None else {"model_state": loaded[1]})
    named = {beginning.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}
    hugging_face_files.write(model, named, folder, {})
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("model", "inputs", "shapes", "reference"), CASES.values(), ids=CASES)
def test_weights_go_in_and_out_with_equal_bits_and_give_equal_logits(model, inputs, shapes, reference, tmp_path):
    weights = numpy_models.draw(np.random.default_rng(1), shapes)
    loaded, found = load(model, inputs, write_folder(tmp_path / "theirs", weights))
    assert found.opened.left == ()
    np.testing.assert_allclose(logits_of(model, inputs, loaded), reference(weights), rtol=0, atol=1e-5)
    written = write_back(model, loaded, tmp_path / "ours")
    counters = {name for name in written if name.endswith("num_batches_tracked")}
    assert {name: written[name].tolist() for name in counters} == dict.fromkeys(counters, 0)
    assert set(written) - counters == set(weights)
    for name, array in weights.items():
        assert (written[name].dtype, written[name].shape) == (array.dtype, array.shape), name
        assert written[name].tobytes() == array.tobytes(), name


RESIDUAL = ("wte", "wpe", "c_proj", "embeddings", "patch_embeddings.projection", "output.dense")


@pytest.mark.parametrize("case", ["gpt", "vit"])
def test_the_epsilon_of_every_normalisation_is_that_of_the_weights(case, tmp_path):
    """With a residual stream so small that the epsilon decides."""
    model, inputs, shapes, reference = CASES[case]
    weights = numpy_models.draw(np.random.default_rng(1), shapes)
    size = np.float32(3e-3 if case == "gpt" else 1e-6)
    for name in weights:
        if any(f"{part}." in f"{name}." for part in RESIDUAL):
            weights[name] *= size
    loaded, _ = load(model, inputs, write_folder(tmp_path / "theirs", weights))
    np.testing.assert_allclose(logits_of(model, inputs, loaded), reference(weights), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "inputs", "plain"),
    [
        (GPT, TOKENS, gpt.GPT(11, 8, num_layers=2, num_heads=2, width=12)),
        (VIT, IMAGES, vit.ViT(3, 4, num_layers=2, num_heads=2, width=12)),
        (RESNET, LARGE_IMAGES, resnet.ResNet(3, (1, 2), "bottleneck", width=4)),
    ],
    ids=["gpt", "vit", "resnet"],
)
def test_a_model_whose_options_are_not_those_of_the_weights_is_refused(model, inputs, plain, tmp_path):
    shapes = {GPT: GPT_SHAPES, VIT: VIT_SHAPES, RESNET: resnet_shapes(RESNET)}[model]
    path = write_folder(tmp_path / "theirs", numpy_models.draw(np.random.default_rng(1), shapes))
    with pytest.raises(errors.UserError, match=r"norm_epsilon|symmetric_padding"):
        load(plain, inputs, path)


GPT_WEIGHTS = numpy_models.draw(np.random.default_rng(2), GPT_SHAPES)


def test_a_config_beside_the_weights_must_fit_what_shapes_do_not_show(tmp_path):
    config = {"n_layer": 2, "n_head": 2, "n_embd": 12}
    load(GPT, TOKENS, write_folder(tmp_path / "a", GPT_WEIGHTS, config))
    mistakes = {"n_head": 3, "layer_norm_epsilon": 1e-6, "activation_function": "relu"}
    for name, value in mistakes.items():
        path = write_folder(tmp_path / name, GPT_WEIGHTS, config | {name: value})
        with pytest.raises(errors.UserError, match=f"{name} is {value!r} there"):
            load(GPT, TOKENS, path)
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(errors.UserError, match="is no JSON"):
        load(GPT, TOKENS, tmp_path / "a")


def test_the_files_of_old_and_of_headless_models_are_read(tmp_path):
    """The first GPT-2 files have no prefix, the masks of attention among them, and the tied matrix twice."""
    old = {name.removeprefix("transformer."): array for name, array in GPT_WEIGHTS.items()}
    old |= {f"h.{n}.attn.bias": np.tril(np.ones((1, 1, 8, 8), np.float32)) for n in (0, 1)}
    old["lm_head.weight"] = old["wte.weight"].copy()
    loaded, found = load(GPT, TOKENS, write_folder(tmp_path / "old", old))
    wanted, _ = load(GPT, TOKENS, write_folder(tmp_path / "new", GPT_WEIGHTS))
    assert found.opened.left == ("h/0/attn/bias", "h/1/attn/bias", "lm_head/weight")
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, wanted))
    old["lm_head.weight"] = old["lm_head.weight"] + 1
    with pytest.raises(errors.UserError, match="tie_embeddings to False"):
        load(GPT, TOKENS, write_folder(tmp_path / "old", old))


def test_an_untied_head_is_read(tmp_path):
    model = dataclasses.replace(GPT, tie_embeddings=False)
    head = RANDOM.normal(size=(11, 12)).astype(np.float32)
    path = write_folder(tmp_path / "untied", {**GPT_WEIGHTS, "lm_head.weight": head})
    loaded, _ = load(model, TOKENS, path)
    assert np.array_equal(loaded[0]["head"]["kernel"], head.T)
    written = write_back(model, loaded, tmp_path / "ours")
    assert np.array_equal(written["lm_head.weight"], head)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_of_other_classes_is_fresh(tmp_path):
    weights = numpy_models.draw(np.random.default_rng(1), VIT_SHAPES)
    path = write_folder(tmp_path / "theirs", weights)
    model = dataclasses.replace(VIT, num_classes=5)
    with pytest.raises(errors.UserError, match=r"params/head/bias .* has \(3,\) and needs \(5,\)"):
        beginning.check(experiment_of(model, path), initial(model, IMAGES))
    found = beginning.check(experiment_of(model, path, fresh=("^params/head/",)), initial(model, IMAGES))
    assert sorted(found.left) == list(found.fresh) == ["params/head/bias", "params/head/kernel"]


def test_what_is_missing_and_what_is_foreign_is_named(tmp_path):
    missing = {name: array for name, array in GPT_WEIGHTS.items() if "h.1.attn.c_attn" not in name}
    with pytest.raises(errors.UserError, match="Missing, of the model: params/block_1/attention/qkv/bias"):
        load(GPT, TOKENS, write_folder(tmp_path / "missing", missing))
    foreign = {**GPT_WEIGHTS, "score.weight": np.ones((2, 12), np.float32)}
    with pytest.raises(errors.UserError, match=r"Without a place in the model, of .*: score/weight"):
        load(GPT, TOKENS, write_folder(tmp_path / "foreign", foreign))
    with pytest.raises(errors.UserError, match="known for jaxdist's GPT, ViT and ResNet; the model is MLP"):
        load(mlp.MLP(3), IMAGES, tmp_path / "foreign")


def test_half_precision_is_widened_with_the_very_values(tmp_path):
    halves = {name: array.astype(np.float16) for name, array in GPT_WEIGHTS.items()}
    loaded, _ = load(GPT, TOKENS, write_folder(tmp_path / "half", halves))
    widened = loaded[0]["token_embedding"]["embedding"]
    assert widened.dtype == np.float32
    assert np.array_equal(widened, halves["transformer.wte.weight"].astype(np.float32))
    wanted = np.asarray(1.5, ml_dtypes.bfloat16)
    assert beginning._fitted(wanted, jax.ShapeDtypeStruct((), np.float32), "x").dtype == np.float32


def test_small_images_and_patches_in_no_square_have_no_counterpart(tmp_path):
    with pytest.raises(errors.UserError, match="small_images=True"):
        hugging_face.correspondence(dataclasses.replace(RESNET, small_images=True))
    shapes = {"params/position_embedding": (1, 7, 12), "params/patch_embedding/kernel": (4, 4, 3, 12)}
    with pytest.raises(errors.UserError, match="6 patches"):
        hugging_face.config_of(VIT, shapes)


def test_only_safetensors_have_other_names(tmp_path):
    with pytest.raises(errors.UserError, match="for safetensors alone; got 'hugging-face' for npz"):
        exports.export(None, tmp_path / "x", "npz", names="hugging-face")


# Beside the library itself.

THEIRS = {
    "gpt": (
        "GPT2LMHeadModel",
        {"vocab_size": 11, "n_positions": 8, "n_embd": 12, "n_layer": 2, "n_head": 2, "bos_token_id": 0}
        | {"eos_token_id": 0},
    ),
    "vit": (
        "ViTForImageClassification",
        {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        | {"image_size": 8, "patch_size": 4, "num_labels": 3},
    ),
    "resnet bottleneck": (
        "ResNetForImageClassification",
        {"embedding_size": 4, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "bottleneck"}
        | {"num_labels": 3},
    ),
    "resnet basic": (
        "ResNetForImageClassification",
        {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [2, 1], "layer_type": "basic", "num_labels": 3},
    ),
}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_logits_and_bits_are_those_of_transformers(case, tmp_path):
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    model, inputs, _, reference = CASES[case]
    name, settings = THEIRS[case]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    theirs = kind(kind.config_class(**settings)).eval()
    with torch.no_grad():
        for each in theirs.parameters():
            each.add_(0.05 * torch.randn_like(each))  # so that biases and scales matter, and logits stay near one
        for name, each in theirs.named_buffers():
            if "running" in name:
                each.add_(0.2 * torch.rand_like(each))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded, _ = load(model, inputs, tmp_path / "theirs")

    def logits(model):
        given = torch.from_numpy(inputs.astype(np.int64) if inputs.ndim == 2 else inputs.transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            return model(given).logits.numpy()

    wanted = logits(theirs)
    np.testing.assert_allclose(logits_of(model, inputs, loaded), wanted, rtol=0, atol=1e-5)
    original = safetensors.numpy.load_file(tmp_path / "theirs" / "model.safetensors")
    np.testing.assert_allclose(reference(original), wanted, rtol=0, atol=1e-5)
    written = write_back(model, loaded, tmp_path / "ours")
    assert set(written) == set(original)
    assert all(written[name].tobytes() == array.tobytes() for name, array in original.items())
    opened, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert np.array_equal(logits(opened.eval()), wanted)
