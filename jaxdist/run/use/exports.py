"""A trained model in standard formats: safetensors, npz, an Orbax checkpoint, or a compiled function of jax.export.

In the first three, the name of an array is its path in the model: `params.Dense_0.kernel`. A vocabulary of the training
data, the names of classes for example, is written beside the export, and into the metadata of safetensors.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from jaxdist import adapters, errors, extras
from jaxdist.checkpoint import orbax_trees
from jaxdist.data.sources import vocabulary
from jaxdist.run.use import npz
from jaxdist.run.use.trained import TrainedRun
from jaxdist.run.warm_start import hugging_face_files
from jaxdist.rundir import files
from jaxdist.spmd.layout import path_name

FORMATS = ("safetensors", "npz", "orbax", "jax-export")
NAMES = ("jaxdist", "hugging-face")
"""Whose names the arrays of safetensors have."""
VOCABULARY_SUFFIX = ".vocabulary.json"
"""What the name of the file beside an export ends with: by field, the names that its numbers stand for."""
_TOLERANCE = 1e-5
"""How far a compiled function may be from the model, relative to the largest output: XLA may fuse it differently."""


def check_output(path: pathlib.Path, kind: str, *, names: str = NAMES[0]) -> None:
    """Raise UserError where no model can be written to `path` in this format and with these names; see `export`."""
    if kind not in FORMATS:
        raise errors.UserError(f"A format is one of {', '.join(FORMATS)}; got {kind!r}.")
    files.check_new(path, "An export")
    if names not in NAMES or (names != NAMES[0] and kind != "safetensors"):
        raise errors.UserError(
            f"Names are {' or '.join(NAMES)}, the latter for safetensors alone; got {names!r} for {kind}."
        )


def export(run: TrainedRun, path: pathlib.Path, kind: str, *, names: str = NAMES[0]) -> None:
    """Write the model of `run` to `path`, which must not exist, in the format `kind`, one of FORMATS.

    The vocabulary of its training data is written beside it.

    With the names `hugging-face`, safetensors is a folder that `from_pretrained` of transformers opens.

    Raises:
      UserError: `path` exists, the format is unknown, or the model cannot be written in it.
    """
    check_output(path, kind, names=names)
    known = vocabulary.vocabulary_of(run.experiment.data.train)
    beside = path.with_name(f"{path.name}{VOCABULARY_SUFFIX}")
    if known:
        files.check_new(beside, "An export")
    _write(run, path, kind, names)
    if known:
        files.write_text(beside, json.dumps(known, indent=1, ensure_ascii=False) + "\n")


def _write(run: TrainedRun, path: pathlib.Path, kind: str, names: str) -> None:
    with errors.as_user_error():
        if names != NAMES[0]:
            named = {name.replace(".", "/"): array for name, array in named_arrays(run).items()}
            hugging_face_files.write(run.experiment.model, named, path, _about(run))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "safetensors":
            files.write(path, [_safetensors(run)])
        elif kind == "npz":
            files.write(path, [npz.content(named_arrays(run))])
        elif kind == "orbax":
            empty = [name for name, array in named_arrays(run).items() if not array.size]  # Orbax names files likewise
            if empty:
                raise errors.UserError(
                    f"Orbax saves no arrays without elements, and {empty[0]} has none. Choose another format."
                )
            orbax_trees.save(path, _tree(run))
        else:
            files.write(path, [compiled(run)])


def named_arrays(run: TrainedRun) -> dict[str, np.ndarray]:
    """Return the arrays of the model, including those of model_state, by name.

    Raises:
      UserError: two have the same name.
    """
    found: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(_tree(run)):
        name = path_name(path, ".")
        if name in found:
            raise errors.UserError(
                f"Each array of an export has a name of its own, and two are called {name}, because a key of the "
                "params contains a dot. Rename it, or export as jax-export."
            )
        found[name] = np.asarray(leaf)
    return found


def _tree(run: TrainedRun) -> dict[str, Any]:
    tree = {"params": adapters.unboxed(run.params)}
    if run.model_state is not None:
        tree["model_state"] = adapters.unboxed(run.model_state)
    return jax.device_get(tree)


def _safetensors(run: TrainedRun) -> bytes:
    module = extras.require("safetensors.numpy", extra="export")
    return module.save(named_arrays(run), metadata=_about(run))


def _about(run: TrainedRun) -> dict[str, str]:
    about = {"experiment": run.experiment.name, "step": str(run.step), "params_sha256": str(run.record.params_sha256)}
    known = vocabulary.vocabulary_of(run.experiment.data.train)
    return about | ({"vocabulary": json.dumps(known, ensure_ascii=False)} if known else {})


def compiled(run: TrainedRun) -> bytes:
    """Return the model as a serialized function of a dict of its inputs, for any number of rows, with its params.

    `jax.export.deserialize(content).call({"image": images})` calls it. It is run once here and compared with the model.

    Raises:
      UserError: the model cannot be traced for an unknown number of rows, or the function gives other outputs.
    """
    extras.require("flatbuffers", extra="export")  # which jax.export serializes with
    names = [run.experiment.inputs] if isinstance(run.experiment.inputs, str) else list(run.experiment.inputs)
    (rows,) = jax_export.symbolic_shape("rows")
    shapes = {name: jax.ShapeDtypeStruct((rows, *run.fields[name].shape[1:]), run.fields[name].dtype) for name in names}
    variables = jax.device_get((run.params, run.model_state))

    def call(inputs: dict[str, jax.Array]) -> Any:
        # As arrays of JAX: a module of NNX that counts its calls would write into those of NumPy, which are read-only.
        params, model_state = jax.tree.map(jnp.asarray, variables)
        return run.outputs(params, model_state, inputs)

    try:
        exported = jax_export.export(jax.jit(call))(shapes)
    except Exception as error:  # any error of the user's model when its number of rows has no value
        raise errors.UserError(
            f"jax-export traces the model for any number of rows, which failed: {type(error).__name__}: {error} "
            "Use x.shape[0] in the model instead of a fixed batch size, or choose another format."
        ) from error
    content = bytes(exported.serialize())
    _compare(run, content, {name: _example(shape) for name, shape in shapes.items()})
    return content


def _example(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    random = np.random.default_rng(0)
    sizes = (3, *shape.shape[1:])
    if np.issubdtype(shape.dtype, np.floating):
        return random.normal(size=sizes).astype(shape.dtype)
    return random.integers(0, 2, sizes).astype(shape.dtype)


def _compare(run: TrainedRun, content: bytes, inputs: dict[str, np.ndarray]) -> None:
    found = jax_export.deserialize(bytearray(content)).call(inputs)
    expected = jax.jit(run.outputs)(*jax.device_get((run.params, run.model_state)), inputs)
    for ours, theirs in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        scale = float(np.max(np.abs(ours), initial=1.0))
        if not np.allclose(ours, theirs, rtol=0, atol=_TOLERANCE * scale):
            raise errors.UserError(
                "The outputs of the exported function differ from those of the model; nothing was written. Choose "
                "another format."
            )
