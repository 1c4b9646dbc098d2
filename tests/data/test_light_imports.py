import subprocess
import sys

from jaxdist.data.sources import source
from jaxdist.spmd import metrics


def test_reading_data_needs_neither_jax_nor_any_optional_package():
    """Worker processes import this; JAX alone would cost each of them a second and 130 MB."""
    heavy = ["jax", "flax", "PIL", "pyarrow", "tensorflow", "tensorflow_datasets", "simplejpeg", "array_record"]
    names = "loader, worker, combine, memmap, folders, tables, records, tfds, wrap, pack, transforms"
    imports = ", ".join(f"jaxdist.data.{name}" for name in names.split(", "))
    code = f"import sys, {imports}; print(sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_mask_has_one_name():
    assert source.MASK == metrics.MASK
