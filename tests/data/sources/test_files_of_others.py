"""Every image of Pillow's tests and every WAV file of SciPy's, read as those libraries read them; fetched by pip."""

import io
import pathlib
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
import scipy.io.wavfile
from PIL import Image, ImageOps

from jaxdist.data import CorruptExample, ImageType
from jaxdist.data.sources.images import decode_image
from jaxdist.data.sources.sounds import SOUND_SUFFIXES, read_sound

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def pillow_images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pillow")
    version = f"pillow=={Image.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "pillow", version]
    subprocess.run([*command, "--dest", str(folder)], check=True, timeout=900)
    (archive,) = folder.glob("pillow-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return [path for path in sorted(folder.glob("*/Tests/images/**/*")) if path.is_file()]


def shown_by_pillow(data):
    """Return what Pillow shows in RGB, and the mode it reads; None where it reads nothing."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            mode = picture.mode
            shown = ImageOps.exif_transpose(picture)
            return np.asarray((shown.convert("RGBA") if mode in ("P", "PA") else shown).convert("RGB")), mode
    except Exception:  # any error for a broken file
        return None


def test_every_image_of_pillows_tests_is_what_pillow_shows(pillow_images):
    wrong, counts = [], {"same": 0, "refused": 0, "corrupt": 0}
    for path in pillow_images:
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = shown_by_pillow(data)
            try:
                ours = decode_image(data, ImageType(), name=path.name)
            except CorruptExample:
                counts["corrupt"] += 1
                wrong += [f"{path.name}: unreadable here, {theirs[1]} for Pillow"] if theirs is not None else []
                continue
            except ValueError:
                counts["refused"] += 1
                continue
        counts["same"] += 1
        if theirs is None:
            wrong.append(f"{path.name}: {ours.shape} here, unreadable for Pillow")
        elif ours.shape != theirs[0].shape:
            wrong.append(f"{path.name}: {ours.shape} here, {theirs[0].shape} for Pillow")
        elif (error := np.abs(ours.astype(int) - theirs[0]).max(initial=0)) > 0:
            wrong.append(f"{path.name}: differs by up to {error} ({theirs[1]})")
    assert len(pillow_images) > 500, counts
    assert counts["same"] > 400, counts
    assert not wrong, "\n".join(wrong)


def test_every_wav_of_scipys_tests_is_what_scipy_reads():
    paths = sorted((pathlib.Path(scipy.io.__file__).parent / "tests" / "data").glob("*.wav"))
    assert len(paths) >= 20
    num_same = 0
    for path in paths:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rate, theirs = scipy.io.wavfile.read(path)
        except Exception:  # broken on purpose
            theirs = None
        try:
            ours, our_rate = read_sound(path)
        except CorruptExample:
            # libsndfile reads no integers of more than 32 bits; files that end early are refused here.
            too_wide = theirs is not None and theirs.dtype.kind == "i" and theirs.itemsize > 4
            assert theirs is None or too_wide or "early-eof" in path.name or "incomplete" in path.name, path.name
            continue
        assert path.suffix in SOUND_SUFFIXES
        if theirs is None:
            continue  # libsndfile reads more kinds of file
        assert our_rate == rate, path.name
        scale = {"u": 128.0, "i": 2.0 ** (8 * theirs.itemsize - 1), "f": 1.0}[theirs.dtype.kind]
        values = (theirs.astype(np.float64) - (128 if theirs.dtype.kind == "u" else 0)) / scale
        np.testing.assert_allclose(ours, values.reshape(len(theirs), -1).mean(axis=1), atol=1e-6, err_msg=path.name)
        num_same += 1
    assert num_same >= 12
