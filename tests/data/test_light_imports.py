import subprocess
import sys

import pytest

from jaxdist import data
from jaxdist.data.sources import source
from jaxdist.spmd import metrics


def test_reading_data_needs_neither_jax_nor_any_optional_package():
    """Worker processes import this; JAX alone would cost each of them a second and 130 MB."""
    heavy = ["jax", "flax", "PIL", "pyarrow", "tensorflow", "tensorflow_datasets", "simplejpeg", "array_record"]
    needs_jax = ("batches", "feed", "host_shards", "process_rows")
    names = [name for name in data.__all__ if name not in needs_jax]
    code = f"import sys; from jaxdist.data import assembly_process, {', '.join(names)}; " + (
        f"print(sorted(set({heavy}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_name_at_the_door_is_there():
    for name in data.__all__:
        assert getattr(data, name) is not None
    assert "Loader" in dir(data)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = data.Nothing


def test_the_mask_has_one_name():
    assert source.MASK == metrics.MASK
