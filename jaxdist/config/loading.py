"""Loading an experiment file: a Python file whose `get_config()` returns an Experiment."""

import contextlib
import dataclasses
import importlib.util
import inspect
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from jaxdist import errors
from jaxdist.config.experiment import Experiment
from jaxdist.errors import ConfigError
from jaxdist.setting_group import nearest, show


def load_experiment(path: str) -> Experiment:
    """Return what the `get_config()` of the Python file `path` returns.

    Raises:
      ConfigError: the file is missing or broken, or has no such function, or it returns something else.
    """
    file = pathlib.Path(path)
    if not file.is_file() or file.suffix != ".py":
        what = "there is none" if not file.exists() else "it is something else"
        raise ConfigError(f"An experiment is a Python file, NAME.py; at {path!r} {what}. Check the path.")
    with _same_folder(path):
        module = _run_file(file)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            what = "does not" if get_config is None else f"has {show(get_config)} in its place"
            proposal = "" if get_config is not None else nearest("get_config", _functions(module))
            raise ConfigError(
                f"An experiment file defines get_config(); {path} {what}.{proposal} Add one that returns Experiment."
            )
        try:
            experiment = get_config()
        except (Exception, SystemExit) as error:
            raise ConfigError(f"get_config() of {path} failed: {errors.describe(error)}") from error
    if inspect.iscoroutine(experiment):
        experiment.close()  # so that Python does not warn, too
    if not isinstance(experiment, Experiment):
        raise ConfigError(
            f"get_config() must return a jaxdist.Experiment; that of {path} returned {type(experiment).__name__}."
        )
    return experiment if experiment.name else dataclasses.replace(experiment, name=file.stem)


@contextlib.contextmanager
def _same_folder(path: str) -> Iterator[None]:
    """Raise ConfigError where the working directory is another one afterwards.

    The paths of a command line would then name other files: the run directory would be made elsewhere.
    """
    before = os.getcwd()
    yield
    if os.getcwd() != before:
        after = os.getcwd()
        os.chdir(before)
        raise ConfigError(
            "An experiment file leaves the working directory as it is, since the paths of a command belong to it; "
            f"{path} changed it to {after}. Build paths from pathlib.Path(__file__).parent instead."
        )


def _functions(module: Any) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not isinstance(value, type)]


_HINTS = {
    "attempted relative import": "Import files of the same folder by their names alone: import NAME.",
    "name 'get_ipython' is not defined": "Remove the commands of the notebook that it was exported from.",
}
"""What to do about errors of files that are part of a package or a notebook elsewhere."""


def _run_file(file: pathlib.Path) -> Any:
    # The stem as name makes qualified names in the run record the same however the file was started; a file that runs
    # as a script is loaded a second time under it, which is why experiments only define things.
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    # As for `python FILE`, and permanently: get_config(), the model and the loss may import files of the same folder.
    folder = str(file.parent.resolve())
    if folder not in sys.path[:1]:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        said = errors.describe(error)
        hints = [hint for text, hint in _HINTS.items() if text in said]
        raise ConfigError(f"{file} cannot be loaded: {said}{f' {hints[0]}' if hints else ''}") from error
    return module
