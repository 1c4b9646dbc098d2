"""The house has floors: what a module may import is read off its source, without importing anything."""

import ast
import collections
import graphlib
import pathlib
import subprocess
import sys

import pytest

import jaxdist

PACKAGE = pathlib.Path(jaxdist.__file__).parent

FLOORS = (
    ("__main__",),
    ("cli",),
    ("paramserver.run", "paramserver.simulator"),
    ("paramserver.processes",),
    ("paramserver.wire",),
    ("paramserver.protocol",),
    ("plan",),
    ("run",),
    ("testing",),
    ("config",),
    ("launch.engines",),
    ("launch.supervising",),
    ("launch.joining",),
    ("launch.own_command_line", "launch.signals", "launch.viewer", "launch.waiting"),
    ("launch.own_cores", "launch.parent"),
    ("data",),
    ("rundir",),
    ("guards",),
    ("checkpoint",),
    ("adapters", "losses", "models", "optimizers", "stop"),
    ("spmd",),
    ("setting_group",),
    ("errors", "extras"),
)
"""From the top floor down, each a set of rooms: a folder with all that is in it, or a module.

A module may import its own room and those on the floors below; nothing above and nothing beside it.
"""

ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PLANNED: set[str] = set()
"""Rooms that have a floor before they are built."""

MOST_ENTRIES, MOST_FILES = 22, 16

HEAVY = {
    "array_record",
    "datasets",
    "fsspec",
    "google",
    "grain",
    "libtpu",
    "mlflow",
    "optuna",
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
    "trackio",
    "wandb",
    "zstandard",
}
"""Packages that are large or optional: each is wrapped by one module, which may import it where it is needed."""

LAZY = {"jaxdist", "jaxdist.data"}
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


def test_there_are_no_import_cycles():
    list(graphlib.TopologicalSorter(INTERNAL).static_order())


def room_of(module: str) -> str | None:
    """Return the room that a module is in, the innermost that has a floor; None where it stands on no floor."""
    inside = module.removeprefix("jaxdist.").split(".")
    names = [".".join(inside[:count]) for count in range(len(inside), 0, -1)]
    return next((name for name in names if name in ROOMS), None)


def is_face(module: str) -> bool:
    """Return whether the module is a package's `__init__`, which may only hand on names from inside its package."""
    return module == "jaxdist" or any(other.startswith(f"{module}.") for other in MODULES)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"jaxdist"}))
def test_imports_go_downward_only(name):
    room = room_of(name)
    if room is None:
        assert is_face(name), f"{name} stands on no floor: add its room to FLOORS"
        assert all(each.startswith(f"{name}.") for each in INTERNAL[name])
        return
    for imported in INTERNAL[name]:
        other = room_of(imported)
        below = other is not None and ROOMS[other] > ROOMS[room]
        assert other == room or below, f"{name} imports {imported}, which is not on a floor below"


WALL_CLOCK = {
    "jaxdist.launch.supervising.board": "a report says when it was written",
    "jaxdist.launch.supervising.restart_events": "restarts.jsonl says when attempts began and ended",
    "jaxdist.paramserver.processes.run_folder": "an attempt's times begin at it, and count on by the monotonic clock",
    "jaxdist.paramserver.run.observer": "reads that, bounded by the monotonic clock",
    "jaxdist.paramserver.wire.certificates": "certificates expire by it; only a message follows",
    "jaxdist.rundir.trackers.mlflow_tracker": "MLflow's time of a value",
    "jaxdist.rundir.writers": "TensorBoard's time of a value",
}
"""Modules that read the clock of the wall, and why: it may be set, so nothing is measured and nothing ends by it."""


def test_no_deadline_is_by_the_clock_of_the_wall():
    """Everything that waits or measures takes `time.monotonic`."""
    readers = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.time"
    }
    assert readers == set(WALL_CLOCK)


def test_the_ground_floor_imports_nothing_of_ours():
    outside = {name: room_of(name) for name in MODULES if room_of(name) == "spmd"}
    assert [(name, each) for name in outside for each in INTERNAL[name] if room_of(each) != "spmd"] == []


def test_every_floor_is_of_the_house():
    rooms = {room_of(name) for name in MODULES}
    assert sorted(set(ROOMS) - rooms - PLANNED) == []


def test_no_folder_is_crowded():
    entries = [path for path in PACKAGE.iterdir() if path.name not in ("__main__.py", "__pycache__")]
    assert len(entries) <= MOST_ENTRIES, sorted(path.name for path in entries)
    files = collections.Counter(path.parent for path in PACKAGE.rglob("*.py"))
    assert {str(folder): count for folder, count in files.items() if count > MOST_FILES} == {}


def test_no_two_modules_share_a_name():
    names = collections.Counter(path.stem for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


SHARED_CLASS_NAMES = {
    "Block": "the block of a ResNet and that of a transformer; Flax names params by their class",
    "CNN": "one model, in Linen and in NNX",
}
"""Names that several public classes have, and why."""


def test_no_two_public_classes_share_a_name():
    """One word has one meaning: a reader who meets a class knows which one it is."""
    names = collections.Counter(
        node.name
        for tree in MODULES.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name for name, count in names.items() if count > 1} == set(SHARED_CLASS_NAMES)


def test_every_module_with_logic_has_a_test_file_of_its_name():
    """A function is logic; a module of names, dataclasses and constants alone needs no test."""
    tests = pathlib.Path(__file__).parent
    missing = []
    for path in PACKAGE.rglob("*.py"):
        has_logic = any(isinstance(node, ast.FunctionDef) for node in ast.walk(MODULES[module_name(path)]))
        test = tests / path.relative_to(PACKAGE).parent / f"test_{path.name}"
        if has_logic and not path.name.startswith("__") and not test.exists():
            missing.append(str(test.relative_to(tests)))
    assert missing == []


def test_the_package_itself_is_not_imported_inside():
    """`jaxdist/__init__.py` lists names for users; inside, modules import modules."""
    assert [name for name, imported in INTERNAL.items() if "jaxdist" in imported] == []


def test_flax_is_imported_by_the_adapters_and_models_alone():
    for name, tree in MODULES.items():
        if "flax" in top_packages(imports(tree)):
            assert name.startswith(("jaxdist.adapters.", "jaxdist.models.")), name


@pytest.mark.parametrize("package", sorted(HEAVY))
def test_a_heavy_package_is_imported_by_one_module(package):
    importers = [name for name, tree in MODULES.items() if package in top_packages(imports(tree))]
    assert len(importers) <= 1, importers


@pytest.mark.parametrize("name", sorted(set(MODULES) - LAZY))
def test_imports_stand_at_the_top_unless_they_wrap_a_heavy_package(name):
    assert top_packages(late_imports(MODULES[name])) <= HEAVY


def test_the_package_runs_as_a_module():
    shown = subprocess.run([sys.executable, "-m", "jaxdist", "--version"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "jaxdist" in shown.stdout
