"""Remote storage that fails as it is told to: before or after what it was asked, or with half of it done."""

import pathlib

BEFORE, AFTER, HALF, SHORT = "before", "after", "half", "short"
FAULTS = (BEFORE, AFTER, HALF, SHORT)
_FAILING = {"put", "pipe_file", "rm_file", "find", "cat_file", "get_file"}


class Killed(BaseException):
    """The process ends here."""


class FaultyFiles:
    """A file system of fsspec whose operations with the numbers in `plan` fail in the way it says.

    `HALF` uploads half of the files, the last of these cut in two, and fails; `SHORT` does so and reports success.
    """

    def __init__(self, files, plan, error=TimeoutError):
        self._files, self.plan, self._error = files, dict(plan), error
        self.count = 0

    def __getattr__(self, name):
        inner = getattr(self._files, name)
        if name not in _FAILING:
            return inner

        def call(*arguments, **options):
            fault = self.plan.get(self.count)
            self.count += 1
            if fault in (HALF, SHORT) and name == "put":
                self._put_half(*arguments)
                if fault == HALF:
                    raise self._error
                return None
            if fault in (BEFORE, HALF):
                raise self._error
            result = inner(*arguments, **options)
            if fault == AFTER:
                raise self._error
            return result

        return call

    def _put_half(self, paths, names):
        for path, name in list(zip(paths, names))[: len(paths) // 2 + 1]:
            content = pathlib.Path(path).read_bytes()
            self._files.pipe_file(name, content)
        self._files.pipe_file(name, content[: len(content) // 2])
