"""Files that experiments make of data that come with packages: a folder in the user's cache, written once."""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable


def written_once(name: str, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """Return the folder `name`, filled by `write(folder)` if it is not there yet; change the name with the contents.

    It is written under another name first, because several processes of a job may come here at the same moment.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxdist-examples"
    folder = cache / name
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        new = pathlib.Path(tempfile.mkdtemp(prefix=f"{name}-", dir=cache))
        write(new)
        try:
            new.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(new)
    return folder
