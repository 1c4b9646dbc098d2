"""Nothing that comes from a disk or a network is unpickled: read off the package's source."""

import ast
import pathlib

import pytest

import jaxdist

PACKAGE = pathlib.Path(jaxdist.__file__).parent
UNSAFE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch"}
BETWEEN_OWN_PROCESSES = {"data/assembly_process.py"}
"""Its payload goes through a pipe from the trainer to a child that the trainer has started."""

FILES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def loads_without_a_guard(tree):
    for name, keywords in calls(tree):
        if name in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
            yield name
        if name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            yield name


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_module_can_unpickle_what_others_wrote(name):
    unsafe = {module for module in imported(FILES[name]) if module.split(".")[0] in UNSAFE}
    assert not unsafe or name in BETWEEN_OWN_PROCESSES
    # JAX's own way to serialize programs pickles their trees.
    assert not [module for module in imported(FILES[name]) if "serialize_executable" in module]
    assert list(loads_without_a_guard(FILES[name])) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import numpy as np\nnp.load(path)", ["np.load"]),
        ("np.load(path, allow_pickle=True)", ["np.load"]),
        ("np.load(path, allow_pickle=False)", []),
        ("yaml.load(text)", ["yaml.load"]),
        ("eval(text)", ["eval"]),
    ],
)
def test_the_check_sees_what_it_looks_for(code, found):
    assert list(loads_without_a_guard(ast.parse(code))) == found
