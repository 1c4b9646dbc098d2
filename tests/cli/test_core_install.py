"""The core install does what the README shows: no optional package is needed for it, nor imported by it."""

import pathlib
import subprocess
import sys

import pytest
import tiny_experiment

WITHOUT_EXTRAS = """
import sys
EXTRAS = {
    *("array_record", "flatbuffers", "fsspec", "google_crc32c", "libtpu", "mlflow", "optuna", "pandas", "PIL"),
    *("plotly", "pyarrow", "ray", "safetensors", "shtab", "simplejpeg", "sklearn", "soundfile", "tensorflow_datasets"),
    "wandb",
}

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in EXTRAS else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from jaxdist.cli import main
sys.exit(main.run(sys.argv[1:]))
"""


def run(*arguments):
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_a_run_is_trained_evaluated_exported_and_listed_without_any_extra(tmp_path):
    experiment, run_dir = pathlib.Path(tiny_experiment.__file__), tmp_path / "runs" / "a"
    for arguments in (
        ("train", experiment, "--devices", 2, "--max-steps", 3, "--run-dir", run_dir),
        ("eval", run_dir),
        ("export", run_dir, tmp_path / "a.npz", "--format", "npz"),
        ("runs", tmp_path / "runs"),
        ("doctor",),
    ):
        done = run(*arguments)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("--strategy", "parameter-server"), "paramserver"),
        (("--set", "writers=jsonl,wandb"), "wandb"),
        (("--run-dir", "s3://bucket/run"), "remote"),
    ],
    ids=["parameter server", "writer", "remote run directory"],
)
@pytest.mark.slow
def test_what_needs_an_extra_that_is_missing_says_what_to_install(tmp_path, arguments, extra):
    done = run("train", tiny_experiment.__file__, "--run-dir", tmp_path / "a", *arguments)
    assert done.returncode == 2, done.stderr
    assert f"pip install 'jaxdist[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a").exists()
