"""Reading more data than memory may hold."""

import subprocess
import sys

import numpy as np
import pytest

ROW_BYTES, NUM_ROWS, LIMIT_BYTES = 2**20, 256, 64 * 2**20

READER = """
import re, resource, sys
import numpy as np
from jaxdist.data import Loader
from jaxdist.data.sources.memmap import NpySource

folder, limit = sys.argv[1], int(sys.argv[2])
source = NpySource({"x": folder + "/x.npy"})
used = 1024 * int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
try:
    np.array(source.arrays["x"])
    sys.exit("The limit does not limit.")
except MemoryError:
    pass
loader = Loader(source, global_batch_size=4, seed=0, num_epochs=1, num_threads=1, read_ahead=2)
print(*sorted(int(row[0]) for batch, _ in loader for row in batch["x"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts memory that is written against RLIMIT_DATA")
def test_four_times_the_allowed_memory_is_read(tmp_path):
    rows = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.int64, (NUM_ROWS, ROW_BYTES // 8))
    rows[:, 0] = np.arange(NUM_ROWS)
    rows.flush()
    assert rows.nbytes == 4 * LIMIT_BYTES
    command = [sys.executable, "-c", READER, str(tmp_path), str(LIMIT_BYTES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(number) for number in range(NUM_ROWS)]
