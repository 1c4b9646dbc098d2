"""GPT-2, ViT and ResNet as transformers computes them, in NumPy and float64: random weights, and their logits.

Nothing of ours is used, so that our models can be compared with it where torch is not installed.
"""

import math

import numpy as np

ERF = np.vectorize(math.erf)


def draw(random, shapes):
    """Return random arrays; scales and variances near one, so that every value matters."""
    arrays = {}
    for name, shape in shapes.items():
        array = random.normal(size=shape) * (0.3 if len(shape) > 1 else 0.2)
        positive = name.endswith(("running_var", "ln_1.weight", "ln_2.weight", "ln_f.weight", "normalization.weight"))
        positive |= "layernorm" in name and name.endswith("weight")
        arrays[name] = (np.abs(1 + array) if positive else array).astype(np.float32)
    return arrays


def layer_norm(x, weights, name, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def attend(query, key, value, heads, *, causal):
    def by_head(x):
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    query, key, value = by_head(query), by_head(key), by_head(value)
    scores = query @ key.transpose(0, 1, 3, 2) / math.sqrt(query.shape[-1])
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    joined = (softmax(scores) @ value).transpose(0, 2, 1, 3)
    return joined.reshape(*joined.shape[:2], -1)


def gpt2_shapes(*, vocabulary, positions, layers, width):
    shapes = {
        "transformer.wte.weight": (vocabulary, width),
        "transformer.wpe.weight": (positions, width),
        "transformer.ln_f.weight": (width,),
        "transformer.ln_f.bias": (width,),
    }
    for layer in range(layers):
        sizes = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width), "mlp.c_fc": (width, 4 * width)}
        sizes["mlp.c_proj"] = (4 * width, width)
        for name, (rows, columns) in sizes.items():
            shapes |= {f"transformer.h.{layer}.{name}.weight": (rows, columns)}
            shapes |= {f"transformer.h.{layer}.{name}.bias": (columns,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"transformer.h.{layer}.{name}.{part}": (width,) for part in ("weight", "bias")}
    return shapes


def gpt2(weights, tokens, *, layers, heads, epsilon=1e-5):
    """Return the logits of GPT2LMHeadModel."""

    def conv1d(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    table = weights["transformer.wte.weight"]
    x = table[tokens] + weights["transformer.wpe.weight"][: tokens.shape[1]]
    for layer in range(layers):
        name = f"transformer.h.{layer}"
        fused = conv1d(layer_norm(x, weights, f"{name}.ln_1", epsilon), f"{name}.attn.c_attn")
        x = x + conv1d(attend(*np.split(fused, 3, axis=-1), heads, causal=True), f"{name}.attn.c_proj")
        hidden = conv1d(layer_norm(x, weights, f"{name}.ln_2", epsilon), f"{name}.mlp.c_fc")
        hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + conv1d(hidden, f"{name}.mlp.c_proj")
    return layer_norm(x, weights, "transformer.ln_f", epsilon) @ table.T


def vit_shapes(*, layers, width, patch, patches, channels, classes):
    shapes = {
        "vit.embeddings.cls_token": (1, 1, width),
        "vit.embeddings.position_embeddings": (1, patches + 1, width),
        "vit.embeddings.patch_embeddings.projection.weight": (width, channels, patch, patch),
        "vit.embeddings.patch_embeddings.projection.bias": (width,),
        "vit.layernorm.weight": (width,),
        "vit.layernorm.bias": (width,),
        "classifier.weight": (classes, width),
        "classifier.bias": (classes,),
    }
    for layer in range(layers):
        name = f"vit.encoder.layer.{layer}"
        sizes = {f"attention.attention.{role}": (width, width) for role in ("query", "key", "value")}
        sizes |= {"attention.output.dense": (width, width), "intermediate.dense": (4 * width, width)}
        sizes["output.dense"] = (width, 4 * width)
        for part, (rows, columns) in sizes.items():
            shapes |= {f"{name}.{part}.weight": (rows, columns), f"{name}.{part}.bias": (rows,)}
        for norm in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{name}.{norm}.{part}": (width,) for part in ("weight", "bias")}
    return shapes


def vit(weights, images, *, layers, heads, epsilon=1e-12):
    """Return the logits of ViTForImageClassification for images (B, H, W, C)."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    kernel = weights["vit.embeddings.patch_embeddings.projection.weight"]
    size, width = kernel.shape[-1], kernel.shape[0]
    count, height, side, channels = images.shape
    patches = images.reshape(count, height // size, size, side // size, size, channels).transpose(0, 1, 3, 5, 2, 4)
    x = patches.reshape(count, -1, channels * size * size) @ kernel.reshape(width, -1).T
    x = x + weights["vit.embeddings.patch_embeddings.projection.bias"]
    token = np.broadcast_to(weights["vit.embeddings.cls_token"], (count, 1, width))
    x = np.concatenate([token, x], axis=1) + weights["vit.embeddings.position_embeddings"]
    for layer in range(layers):
        name = f"vit.encoder.layer.{layer}"
        normed = layer_norm(x, weights, f"{name}.layernorm_before", epsilon)
        roles = [linear(normed, f"{name}.attention.attention.{role}") for role in ("query", "key", "value")]
        x = x + linear(attend(*roles, heads, causal=False), f"{name}.attention.output.dense")
        hidden = linear(layer_norm(x, weights, f"{name}.layernorm_after", epsilon), f"{name}.intermediate.dense")
        x = x + linear(hidden * (1 + ERF(hidden / math.sqrt(2))) / 2, f"{name}.output.dense")
    return linear(layer_norm(x, weights, "vit.layernorm", epsilon)[:, 0], "classifier")


def resnet_shapes(*, depths, width, kind, channels, classes):
    expansion = 4 if kind == "bottleneck" else 1
    shapes = conv_shapes("resnet.embedder.embedder", width, channels, 7)
    before = width
    for stage, depth in enumerate(depths):
        inner = width * 2**stage
        for block in range(depth):
            name = f"resnet.encoder.stages.{stage}.layers.{block}"
            if before != inner * expansion or (stage > 0 and block == 0):
                shapes |= conv_shapes(f"{name}.shortcut", inner * expansion, before, 1)
            if kind == "basic":
                layers = [(inner, before, 3), (inner, inner, 3)]
            else:
                layers = [(inner, before, 1), (inner, inner, 3), (4 * inner, inner, 1)]
            for number, sizes in enumerate(layers):
                shapes |= conv_shapes(f"{name}.layer.{number}", *sizes)
            before = inner * expansion
    return shapes | {"classifier.1.weight": (classes, before), "classifier.1.bias": (classes,)}


def conv_shapes(name, out, into, size):
    norm = {f"{name}.normalization.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")}
    return {f"{name}.convolution.weight": (out, into, size, size), **norm}


def resnet(weights, images, *, depths, kind):
    """Return the logits of ResNetForImageClassification for images (B, H, W, C)."""
    weights = {name: array.astype(np.float64) for name, array in weights.items()}

    def conv_norm(x, name, stride, *, relu=True):
        kernel = weights[f"{name}.convolution.weight"]
        size = kernel.shape[-1]
        pad = (size - 1) // 2
        padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        rows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))[:, :, ::stride, ::stride]
        x = np.einsum("bchwij,ocij->bohw", rows, kernel)
        parts = [weights[f"{name}.normalization.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        mean, variance, scale, shift = (part[:, None, None] for part in parts)
        x = (x - mean) / np.sqrt(variance + 1e-5) * scale + shift
        return np.maximum(x, 0) if relu else x

    x = conv_norm(images.transpose(0, 3, 1, 2), "resnet.embedder.embedder", 2)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::2, ::2].max((-1, -2))
    for stage, depth in enumerate(depths):
        for block in range(depth):
            name, stride = f"resnet.encoder.stages.{stage}.layers.{block}", 2 if stage and not block else 1
            shortcut = f"{name}.shortcut"
            known = f"{shortcut}.convolution.weight" in weights
            kept = conv_norm(x, shortcut, stride, relu=False) if known else x
            strides = (stride, 1) if kind == "basic" else (1, stride, 1)
            for number, each in enumerate(strides):
                x = conv_norm(x, f"{name}.layer.{number}", each, relu=number < len(strides) - 1)
            x = np.maximum(x + kept, 0)
    return x.mean((2, 3)) @ weights["classifier.1.weight"].T + weights["classifier.1.bias"]
