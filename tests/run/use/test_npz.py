import io

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxdist import errors
from jaxdist.run.use import npz

NAMES = st.text("abf./_ é", min_size=1, max_size=4) | st.sampled_from(["file", "allow_pickle", "args", "kwds", "self"])
NUMBERS = st.one_of(
    *[arrays.arrays(kind, (2, 3)) for kind in (np.float16, np.float32, np.complex64, np.int8, np.bool_)]
)


@settings(max_examples=30)
@given(st.dictionaries(NAMES, NUMBERS, max_size=5))
def test_numpy_reads_the_very_arrays_whatever_their_names(named):
    with np.load(io.BytesIO(npz.content(named)), allow_pickle=False) as found:
        assert sorted(found.files) == sorted(named)
        for name, array in named.items():
            assert (found[name].dtype, found[name].tobytes()) == (array.dtype, array.tobytes())


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4])
def test_what_numpy_would_read_as_bytes_without_a_type_is_refused(kind):
    with pytest.raises(errors.UserError, match=rf"NumPy has no {np.dtype(kind)}.* cannot hold b\. Choose another"):
        npz.content({"a": np.ones(2), "b": np.ones(2, kind)})
