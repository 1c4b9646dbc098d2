"""Which line of a user's code an instruction of an optimized program comes from.

XLA prints tables of files, locations and stack frames before a program, and the number of a frame with each
instruction.
"""

import re
import sysconfig

_NAME = re.compile(r'^(\d+) "(.*)"$')
_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)")
_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
_FRAME_ID = re.compile(r"stack_frame_id=(\d+)")
_DIRECT = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib"))


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
        """Return `FILE:LINE` of the innermost line outside installed packages; empty where the program does not say."""
        direct = _DIRECT.search(instruction)
        if direct:
            return f"{direct[1]}:{direct[2]}"
        found = _FRAME_ID.search(instruction)
        lines = self._stack(found[1]) if found else []
        own = [line for line in lines if not line.startswith(_LIBRARIES)]
        return (own or lines or [""])[0]

    def _stack(self, frame: str) -> list[str]:
        lines = []
        while frame in self._frames:
            location, parent = self._frames[frame]
            file, line = self._locations[location]
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
