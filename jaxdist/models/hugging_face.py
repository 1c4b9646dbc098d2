"""The names that transformers gives to the weights of GPT-2, ViT and ResNet, and how they map to our models.

A table for each model says which of their arrays make which of ours. Every conversion moves values and computes none,
so that weights go in and out with the same bits.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from jaxdist.errors import UserError
from jaxdist.models.gpt import GPT
from jaxdist.models.resnet import EXPANSION, ResNet
from jaxdist.models.vit import ViT

Arrays: TypeAlias = Sequence[np.ndarray]
Shapes: TypeAlias = Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """One of our leaves, and their arrays that make it; `to_ours` and `to_theirs` undo each other."""

    ours: str
    theirs: tuple[str, ...]
    to_ours: Callable[..., np.ndarray] = lambda array: array
    to_theirs: Callable[[np.ndarray], Arrays] = lambda array: (array,)


@dataclasses.dataclass(frozen=True)
class Correspondence:
    """How a model of ours and one of transformers correspond.

    Attributes:
      table: a conversion for each leaf of ours.
      prefix: of the names in a model with a head; files of the model without one lack it.
      ignored: ends of names in their files that hold nothing trained.
      counters: names of their counters, which ours does not keep; zero in what is written.
      same_as: one of their names -> another whose values it must have.
      settings: what of their config.json decides outputs: name -> (value for this model, value where it is not given,
        our setting).
      unseen: those of `settings` that cannot be seen in the shapes of weights, and are the same for all known weights.
    """

    table: tuple[Conversion, ...]
    prefix: str
    ignored: tuple[str, ...]
    counters: tuple[str, ...]
    same_as: Mapping[str, str]
    settings: Mapping[str, tuple[Any, Any, str]]
    unseen: tuple[str, ...]


def correspondence(model: Any) -> Correspondence:
    """Return how a model corresponds to one of transformers.

    Raises:
      UserError: it is not a GPT, ViT or ResNet, or has a form that transformers does not have.
    """
    if type(model) is GPT:
        if model.base_width not in (None, model.width):
            raise UserError(
                "transformers has no muP: a GPT whose width differs from its base_width scales attention and logits in "
                f"other ways; got width {model.width} and base_width {model.base_width}. Export in another format."
            )
        return _of_gpt(model)
    if type(model) is ViT:
        return _of_vit(model)
    if type(model) is ResNet:
        return _of_resnet(model)
    name = getattr(model, "__name__", type(model).__name__)
    raise UserError(
        f"The names of transformers are known for jaxdist's GPT, ViT and ResNet; the model is {name}. Rename the "
        "leaves by init_from.rules, or leave --names out."
    )


def check_config(model: Any, found: Correspondence, config: Mapping[str, Any] | None) -> None:
    """Raise UserError where weights would compute something else in `model` than they were trained for.

    `config` is the content of their config.json; None without one, when the values of all known weights are assumed.
    """
    names = found.settings if config is not None else found.unseen
    for name in names:
        ours, usual, setting = found.settings[name]
        theirs = (config or {}).get(name, usual)
        both_numbers = isinstance(theirs, float) and isinstance(ours, float)
        if not (math.isclose(ours, theirs) if both_numbers else ours == theirs):
            raise UserError(
                f"Weights of transformers need the settings they were trained with; {name} is {theirs!r} there, and "
                f"{ours!r} in this {type(model).__name__}. Set the model's {setting}."
            )


def config_of(model: Any, shapes: Shapes) -> dict[str, Any]:
    """Return the content of a config.json with which transformers builds the same model, given its leaves' shapes."""
    found = correspondence(model)
    config = {name: ours for name, (ours, _, _) in found.settings.items()}
    if isinstance(model, GPT):
        drop = {"embd_pdrop": model.dropout_rate, "resid_pdrop": model.dropout_rate, "attn_pdrop": 0.0}
        more = {"vocab_size": model.vocab_size, "n_positions": model.context_length, **drop}
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **config, **more}
    labels = {str(number): f"LABEL_{number}" for number in range(model.num_classes)}
    config |= {"id2label": labels, "label2id": {label: int(number) for number, label in labels.items()}}
    if isinstance(model, ViT):
        patches = shapes["params/position_embedding"][1] - 1
        side = math.isqrt(patches)
        if side * side != patches:
            raise UserError(f"transformers' ViT takes square images; this one has {patches} patches. Use other names.")
        more = {"image_size": side * model.patch_size, "hidden_dropout_prob": model.dropout_rate}
        more |= {"num_channels": shapes["params/patch_embedding/kernel"][2], "attention_probs_dropout_prob": 0.0}
        return {"architectures": ["ViTForImageClassification"], "model_type": "vit", **config, **more}
    config |= {"num_channels": shapes["params/stem_conv/kernel"][2]}
    return {"architectures": ["ResNetForImageClassification"], "model_type": "resnet", **config}


# The layers that the models share.


def _linear(ours: str, theirs: str) -> list[Conversion]:
    return [Conversion(f"params/{ours}/kernel", (f"{theirs}.weight",), _swapped, _swapped_alone), _bias(ours, theirs)]


def _conv1d(ours: str, theirs: str) -> list[Conversion]:
    """GPT-2's own layer, whose matrix has the order of ours."""
    return [Conversion(f"params/{ours}/kernel", (f"{theirs}.weight",)), _bias(ours, theirs)]


def _bias(ours: str, theirs: str) -> Conversion:
    return Conversion(f"params/{ours}/bias", (f"{theirs}.bias",))


def _norm(ours: str, theirs: str) -> list[Conversion]:
    return [Conversion(f"params/{ours}/scale", (f"{theirs}.weight",)), _bias(ours, theirs)]


def _conv(ours: str, theirs: str) -> Conversion:
    return Conversion(
        f"params/{ours}/kernel",
        (f"{theirs}.weight",),
        lambda array: np.transpose(array, (2, 3, 1, 0)),
        lambda array: (np.transpose(array, (3, 2, 0, 1)),),
    )


def _swapped(array: np.ndarray) -> np.ndarray:
    return array.T


def _swapped_alone(array: np.ndarray) -> Arrays:
    return (array.T,)


# GPT-2.


def _of_gpt(model: GPT) -> Correspondence:
    heads = model.num_heads

    def to_ours(array: np.ndarray) -> np.ndarray:
        """All queries, then all keys, then all values -> head by head, each with its query, key and value."""
        return np.moveaxis(array.reshape(*array.shape[:-1], 3, heads, -1), -3, -2).reshape(array.shape)

    def to_theirs(array: np.ndarray) -> Arrays:
        return (np.moveaxis(array.reshape(*array.shape[:-1], heads, 3, -1), -2, -3).reshape(array.shape),)

    table = [
        Conversion("params/token_embedding/embedding", ("transformer.wte.weight",)),
        Conversion("params/position_embedding", ("transformer.wpe.weight",)),
        *_norm("final_norm", "transformer.ln_f"),
    ]
    for index in range(model.num_layers):
        ours, theirs = f"block_{index}", f"transformer.h.{index}"
        table += [
            *_norm(f"{ours}/attention_norm", f"{theirs}.ln_1"),
            Conversion(f"params/{ours}/attention/qkv/kernel", (f"{theirs}.attn.c_attn.weight",), to_ours, to_theirs),
            Conversion(f"params/{ours}/attention/qkv/bias", (f"{theirs}.attn.c_attn.bias",), to_ours, to_theirs),
            *_conv1d(f"{ours}/attention/out", f"{theirs}.attn.c_proj"),
            *_norm(f"{ours}/mlp_norm", f"{theirs}.ln_2"),
            *_conv1d(f"{ours}/mlp_in", f"{theirs}.mlp.c_fc"),
            *_conv1d(f"{ours}/mlp_out", f"{theirs}.mlp.c_proj"),
        ]
    tied = model.tie_embeddings
    table += [] if tied else [Conversion("params/head/kernel", ("lm_head.weight",), _swapped, _swapped_alone)]
    settings = {
        "n_layer": (model.num_layers, 12, "num_layers"),
        "n_head": (heads, 12, "num_heads"),
        "n_embd": (model.width, 768, "width"),
        "layer_norm_epsilon": (model.norm_epsilon, 1e-5, "norm_epsilon"),
        "tie_word_embeddings": (tied, True, "tie_embeddings"),
        "activation_function": ("gelu_new", "gelu_new", "weights: no setting gives this activation"),
        "scale_attn_weights": (True, True, "weights: no setting gives this attention"),
        "scale_attn_by_inverse_layer_idx": (False, False, "weights: no setting gives this attention"),
    }
    return Correspondence(
        table=tuple(table),
        prefix="transformer.",
        ignored=(".attn.bias", ".attn.masked_bias"),
        counters=(),
        same_as={"lm_head.weight": "transformer.wte.weight"} if tied else {},
        settings=settings,
        unseen=("layer_norm_epsilon",),
    )


# ViT.


def _of_vit(model: ViT) -> Correspondence:
    heads = model.num_heads

    def to_ours(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Three matrices (out, in), or biases, -> one (in, out), head by head with its query, key and value."""
        parts = [part.T.reshape(*part.T.shape[:-1], heads, 1, -1) for part in (query, key, value)]
        return np.concatenate(parts, axis=-2).reshape(*query.T.shape[:-1], -1)

    def to_theirs(array: np.ndarray) -> Arrays:
        by_head = array.reshape(*array.shape[:-1], heads, 3, -1)
        return [by_head[..., part, :].reshape(*array.shape[:-1], -1).T for part in range(3)]

    patches = "vit.embeddings.patch_embeddings.projection"
    table = [
        Conversion("params/class_token", ("vit.embeddings.cls_token",)),
        Conversion("params/position_embedding", ("vit.embeddings.position_embeddings",)),
        _conv("patch_embedding", patches),
        _bias("patch_embedding", patches),
        *_norm("final_norm", "vit.layernorm"),
        *_linear("head", "classifier"),
    ]
    for index in range(model.num_layers):
        ours, theirs = f"block_{index}", f"vit.encoder.layer.{index}"
        for part, name in (("kernel", "weight"), ("bias", "bias")):
            three = tuple(f"{theirs}.attention.attention.{role}.{name}" for role in ("query", "key", "value"))
            table.append(Conversion(f"params/{ours}/attention/qkv/{part}", three, to_ours, to_theirs))
        table += [
            *_norm(f"{ours}/attention_norm", f"{theirs}.layernorm_before"),
            *_linear(f"{ours}/attention/out", f"{theirs}.attention.output.dense"),
            *_norm(f"{ours}/mlp_norm", f"{theirs}.layernorm_after"),
            *_linear(f"{ours}/mlp_in", f"{theirs}.intermediate.dense"),
            *_linear(f"{ours}/mlp_out", f"{theirs}.output.dense"),
        ]
    settings = {
        "num_hidden_layers": (model.num_layers, 12, "num_layers"),
        "num_attention_heads": (heads, 12, "num_heads"),
        "hidden_size": (model.width, 768, "width"),
        "intermediate_size": (4 * model.width, 3072, "width"),
        "patch_size": (model.patch_size, 16, "patch_size"),
        "layer_norm_eps": (model.norm_epsilon, 1e-12, "norm_epsilon"),
        "hidden_act": ("gelu" if model.exact_gelu else "gelu_pytorch_tanh", "gelu", "exact_gelu"),
        "qkv_bias": (True, True, "weights: attention has biases here"),
    }
    return Correspondence(
        table=tuple(table),
        prefix="vit.",
        ignored=(".pooler.dense.weight", ".pooler.dense.bias"),
        counters=(),
        same_as={},
        settings=settings,
        unseen=("layer_norm_eps", "hidden_act"),
    )


# ResNet.


def _of_resnet(model: ResNet) -> Correspondence:
    if model.small_images or not model.symmetric_padding:
        raise UserError(
            "transformers' ResNet has the stem of large images and pads as torch does; this one has small_images="
            f"{model.small_images} and symmetric_padding={model.symmetric_padding}. Set them to False and True."
        )
    table = _conv_norm("stem_conv", "stem_norm", "resnet.embedder.embedder")
    for stage, num_blocks in enumerate(model.stage_sizes):
        for index in range(num_blocks):
            ours, theirs = f"stage_{stage}_block_{index}", f"resnet.encoder.stages.{stage}.layers.{index}"
            if index == 0 and (stage > 0 or model.block == "bottleneck"):
                table += _conv_norm(f"{ours}/shortcut_conv", f"{ours}/shortcut_norm", f"{theirs}.shortcut")
            for number, name in enumerate(("first", "last") if model.block == "basic" else ("first", "middle", "last")):
                table += _conv_norm(f"{ours}/{name}_conv", f"{ours}/{name}_norm", f"{theirs}.layer.{number}")
    table += _linear("head", "classifier.1")
    expansion = EXPANSION[model.block]
    sizes = [model.width * 2**stage * expansion for stage in range(len(model.stage_sizes))]
    settings = {
        "embedding_size": (model.width, 64, "width"),
        "hidden_sizes": (sizes, [256, 512, 1024, 2048], "width, stage_sizes or block"),
        "depths": (list(model.stage_sizes), [3, 4, 6, 3], "stage_sizes"),
        "layer_type": (model.block, "bottleneck", "block"),
        "hidden_act": ("relu", "relu", "weights: no setting gives this activation"),
        "downsample_in_first_stage": (False, False, "weights: no setting gives this stride"),
        "downsample_in_bottleneck": (False, False, "weights: no setting gives this stride"),
    }
    running = [each.theirs[0] for each in table if each.theirs[0].endswith(".running_mean")]
    return Correspondence(
        table=tuple(table),
        prefix="resnet.",
        ignored=(".num_batches_tracked",),
        counters=tuple(name.removesuffix("running_mean") + "num_batches_tracked" for name in running),
        same_as={},
        settings=settings,
        unseen=(),
    )


def _conv_norm(conv: str, norm: str, theirs: str) -> list[Conversion]:
    statistics = [
        Conversion(f"model_state/batch_stats/{norm}/norm/{ours}", (f"{theirs}.normalization.running_{ours}",))
        for ours in ("mean", "var")
    ]
    return [
        _conv(conv, f"{theirs}.convolution"),
        *_norm(f"{norm}/norm", f"{theirs}.normalization"),
        *statistics,
    ]
