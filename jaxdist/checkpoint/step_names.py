"""Names of the directories of checkpoints: `40`, or `40.1` for a step that was saved a second time."""

import pathlib
import re

FOLDER_NAME = "checkpoints"
"""Name of the directory of checkpoints in a run directory."""
_STEP_NAME = re.compile(r"(0|[1-9]\d*)(?:\.([1-9]\d*))?")


def check_spelling(directory: pathlib.Path) -> None:
    """Raise ValueError where the libraries that store arrays cannot be told the name of a directory."""
    try:
        str(directory).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Checkpoints are stored in a directory whose name is text in UTF-8; {str(directory)!r} is not, or not in "
            "this locale. Name another, or set LC_ALL=C.UTF-8."
        ) from error


def parse(name: str) -> tuple[int, int] | None:
    """Return the step that a directory holds and how often it was saved before; None if it holds no checkpoint."""
    match = _STEP_NAME.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2] or 0))


def committed(directory: pathlib.Path) -> dict[int, list[pathlib.Path]]:
    """Return step -> its directories in a directory of checkpoints; the last one is valid."""
    found: dict[int, list[tuple[int, pathlib.Path]]] = {}
    for path in directory.iterdir() if directory.is_dir() else ():
        if named := parse(path.name):
            found.setdefault(named[0], []).append((named[1], path))
    return {step: [path for _, path in sorted(paths)] for step, paths in found.items()}
