"""Which line of a user's code an instruction of an optimized program comes from.

XLA prints tables of files, locations and stack frames before a program, and the number of a frame with each
instruction.
"""

import contextlib
import pathlib
import re
import sysconfig
from collections.abc import Iterator

import jax

_NAME = re.compile(r'^(\d+) "(.*)"$')
_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)")
_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
_FRAME_ID = re.compile(r"stack_frame_id=(\d+)")
_DIRECT = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib", "scripts"))
_PACKAGE = str(pathlib.Path(__file__).parents[2])
_PLAN, _MODELS = f"{_PACKAGE}/plan/", (f"{_PACKAGE}/models/", f"{_PACKAGE}/losses/")


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within it, compiled programs know all lines they come from, as the files are now.

    Otherwise JAX keeps ten frames of a stack, which may miss a deep model's own lines, and a program from the
    compilation cache has the line numbers that its files had when it was cached.
    """
    wanted = {"jax_traceback_in_locations_limit": -1, "jax_compilation_cache_include_metadata_in_key": True}
    before = {name: jax.config.values[name] for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


class SourceLines:
    """Finds `FILE:LINE` of the instructions of one program, given as `compiled.as_text()`."""

    def __init__(self, hlo: str):
        tables = _tables(hlo)
        self._files = {match[1]: match[2] for line in tables["FileNames"] if (match := _NAME.match(line))}
        located = [match for line in tables["FileLocations"] if (match := _LOCATION.match(line))]
        self._locations = {match[1]: (match[2], match[3]) for match in located}
        framed = [match for line in tables["StackFrames"] if (match := _FRAME.match(line))]
        self._frames = {match[1]: (match[2], match[3]) for match in framed}

    def of(self, instruction: str) -> str:
        """Return `FILE:LINE` of the innermost line of the user's code; empty where the program does not say.

        Where none is the user's, it is the innermost line of a model or loss of this package, else of this package.
        """
        direct = _DIRECT.search(instruction)
        if direct:
            return f"{direct[1]}:{direct[2]}"
        found = _FRAME_ID.search(instruction)
        lines = self._stack(found[1]) if found else []
        ours = [line for line in lines if line.startswith(_PACKAGE)]
        users = [line for line in lines if not line.startswith((*_LIBRARIES, _PACKAGE))]
        models = [line for line in ours if line.startswith(_MODELS)]
        return (users or models or ours or lines or [""])[0]

    def _stack(self, frame: str) -> list[str]:
        lines = []
        while frame in self._frames:
            location, parent = self._frames[frame]
            file, line = self._locations[location]
            if self._files[file].startswith(_PLAN):
                break  # From here outwards it is who asked for the plan.
            lines.append(f"{self._files[file]}:{line}")
            frame = str(int(parent or 1) - 1)  # Parents are numbered from 1 up; a frame without a parent has parent 1.
        return lines


def _tables(hlo: str) -> dict[str, list[str]]:
    tables: dict[str, list[str]] = {"FileNames": [], "FileLocations": [], "StackFrames": []}
    rows: list[str] = []
    for line in hlo.splitlines():
        if line.startswith(("%", "ENTRY")):
            break
        if line[:1].isdigit():
            rows.append(line)
        elif line:
            rows = tables.get(line, [])
    return tables
