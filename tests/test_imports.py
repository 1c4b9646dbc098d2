"""The house has floors: what a module may import is read off its source, without importing anything."""

import ast
import graphlib
import pathlib

import pytest

import jaxdist

PACKAGE = pathlib.Path(jaxdist.__file__).parent

FLOORS = (
    {"errors", "metrics", "mesh", "layout", "executable", "precision"},
    {"state", "reduce", "canonical"},
    {"step"},
    {"evaluate", "strategies"},
    {"loop", "hooks", "guard"},
    {"training", "train", "verify"},
    {"cli"},
)
"""A module may import its own floor and those below; modules not named here stand anywhere, but never in a cycle."""

HEAVY = {
    "array_record",
    "datasets",
    "google",
    "grain",
    "grpc",
    "libtpu",
    "orbax",
    "PIL",
    "pyarrow",
    "ray",
    "simplejpeg",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
}
"""Packages that are large or optional: each is wrapped by one module, which may import it where it is needed."""

LAZY = {"jaxdist", "jaxdist.cli", "jaxdist.data"}
"""Modules that import late on purpose: `jaxdist --help` answers before JAX is loaded."""


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        # `from jaxdist import step` imports the module jaxdist.spmd.step, not what jaxdist/__init__.py holds.
        dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else str(node.module) for name in dotted]
    return []


def imports(tree: ast.AST) -> set[str]:
    return {name for node in ast.walk(tree) for name in imported_names(node)}


def late_imports(tree: ast.AST) -> set[str]:
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    guarded = (
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    )
    return {name for node in (*functions, *guarded) for name in imports(node)}


def top_packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


INTERNAL = {name: {each for each in imports(tree) if each in MODULES} for name, tree in MODULES.items()}


def test_no_module_imports_itself_round_a_corner():
    list(graphlib.TopologicalSorter(INTERNAL).static_order())


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_imports_go_downward_only(floor):
    above = {f"jaxdist.{name}" for higher in FLOORS[floor + 1 :] for name in higher}
    for name in FLOORS[floor]:
        assert INTERNAL.get(f"jaxdist.{name}", set()) & above == set(), f"jaxdist.{name} imports from a floor above"


def test_the_package_itself_is_imported_by_nobody_inside():
    """`jaxdist/__init__.py` lists names for users; inside, modules import modules."""
    assert [name for name, imported in INTERNAL.items() if "jaxdist" in imported] == []


def test_flax_is_imported_by_the_adapters_and_models_alone():
    for name, tree in MODULES.items():
        if "flax" in top_packages(imports(tree)):
            assert name in {"jaxdist.adapters", "jaxdist.flax_layout"} or name.startswith("jaxdist.models."), name


@pytest.mark.parametrize("package", sorted(HEAVY))
def test_a_heavy_package_is_imported_by_one_module(package):
    importers = [name for name, tree in MODULES.items() if package in top_packages(imports(tree))]
    assert len(importers) <= 1, importers


@pytest.mark.parametrize("name", sorted(set(MODULES) - LAZY))
def test_imports_stand_at_the_top_unless_they_wrap_a_heavy_package(name):
    assert top_packages(late_imports(MODULES[name])) <= HEAVY
