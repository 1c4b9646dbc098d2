"""Strategies from the command line: the same losses, resuming onto another, and what is refused."""

import json
import pathlib

import jax
import pytest

from jaxdist.cli import main
from jaxdist.launch.joining import runtime
from jaxdist.spmd import strategies

pytestmark = pytest.mark.usefixtures("shared_compilations")

TINY = str(pathlib.Path(__file__).parents[1] / "tiny_experiment.py")
COMMON = ["--devices", "8", "--max-steps", "6", "--json", "--set", "model.dropout_rate=0", "layout.min_size=8"]
WAYS = {
    "data-parallel": [],
    "zero1": [],
    "fsdp": [],
    "hsdp": ["mesh={'data': 2, 'fsdp': 4}"],
    "tensor": ["mesh={'data': 2, 'model': 4}", "layout.rules=[('Dense_0/kernel', (None, 'model'))]"],
}


@pytest.fixture(autouse=True)
def on_the_test_devices(monkeypatch):
    """Commands prepare a process of their own; here they get what this process has."""
    monkeypatch.setattr(runtime, "start", lambda num_devices=None, threads=None: jax.devices()[: num_devices or 1])


def train(capsys, name, run_dir, *more):
    assert main.run(["train", TINY, "--strategy", name, "--run-dir", str(run_dir), *COMMON, *WAYS[name], *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_strategies_agree_on_the_loss_and_a_run_of_one_resumes_under_another(capsys, tmp_path):
    """test_relayout.py compares the bits of all pairs, test_sharded.py every strategy with one device."""
    records = {name: train(capsys, name, tmp_path / name) for name in ("data-parallel", "fsdp")}
    losses = [record["metrics"]["train/loss"] for record in records.values()]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    for name in ("tensor", "data-parallel"):
        resumed = train(capsys, name, tmp_path / "fsdp", "--resume")
        assert (resumed["strategy"], resumed["step"]) == ("fsdp", 6)  # nothing was trained under another
        assert resumed["params_sha256"] == records["fsdp"]["params_sha256"]
    for step, name in enumerate(("tensor", "data-parallel"), 7):
        resumed = train(capsys, name, tmp_path / "fsdp", "--resume", "--max-steps", str(step))
        assert (resumed["strategy"], resumed["step"]) == (name, step)


@pytest.mark.slow
def test_canonical_zero1_has_the_hash_of_canonical_data_parallel(capsys, tmp_path):
    options = ["--reduction", "canonical", "--devices", "2", "--max-steps", "3"]
    records = [train(capsys, name, tmp_path / name, *options) for name in ("data-parallel", "zero1")]
    assert records[0]["params_sha256"] == records[1]["params_sha256"]
    assert [record["strategy"] for record in records] == ["data-parallel", "zero1"]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_gpt_of_the_experiments_has_the_same_losses_under_every_strategy(capsys, tmp_path):
    experiment = str(pathlib.Path(__file__).parents[2] / "experiments" / "bytes_gpt.py")
    found = {}
    for name in ("data-parallel", "zero1", "fsdp"):
        arguments = ["--strategy", name, "--devices", "8", "--max-steps", "20", "--json"]
        assert main.run(["train", experiment, *arguments, "--run-dir", str(tmp_path / name)]) == 0
        found[name] = json.loads(capsys.readouterr().out)["metrics"]
    for metrics in found.values():
        assert metrics == {name: pytest.approx(value, abs=1e-5) for name, value in found["data-parallel"].items()}


@pytest.mark.slow
def test_verify_compares_every_strategy_with_the_one_device_step(capsys):
    fixed = ["--set", "model.dropout_rate=0", "layout.min_size=8"]
    small, all_devices = ["--devices", "2"], ["--devices", "8"]
    for strategy, devices, more in (("fsdp", [1, 2], small), ("tensor", [8], all_devices)):
        options = ["--strategy", strategy, "--steps", "2", "--json", *more, *fixed, *WAYS[strategy]]
        assert main.run(["verify", TINY, *options]) == 0
        report = json.loads(capsys.readouterr().out)
        assert [row["num_devices"] for row in report["rows"]] == devices
        assert {row["verdict"] for row in report["rows"]} <= {"equal", "identical"}
        assert f"strategy {strategy}" in report["title"]


@pytest.mark.slow
def test_canonical_runs_with_a_tensor_axis_have_the_same_bits_on_any_size_of_the_data_axis(capsys, tmp_path):
    rules = "layout.rules=[('Dense_0/kernel', (None, 'model'))]"
    fixed = ["--strategy", "tensor", "--reduction", "canonical", *COMMON, rules, "mesh={'data': -1, 'model': 2}"]
    records = []
    for devices in ("2", "8"):
        run_dir = str(tmp_path / devices)
        assert main.run(["train", TINY, "--run-dir", run_dir, "--devices", devices, *fixed]) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert records[0]["params_sha256"] == records[1]["params_sha256"]
    assert records[0]["metrics"]["eval/loss"] == records[1]["metrics"]["eval/loss"]
    assert main.run(["diff", str(tmp_path / "2"), str(tmp_path / "8")]) == 0


def test_verify_says_which_devices_a_mesh_needs(capsys):
    assert main.run(["verify", TINY, "--devices", "2", "--strategy", "tensor", "--set", *WAYS["tensor"]]) == 2
    assert "needs 8 devices, and there are 2" in capsys.readouterr().err


MODEL_AXIS = "mesh={'data': 2, 'model': 4}"


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        ("pipeline", [], "There is no strategy 'pipeline'"),
        ("tensor", ["reduction=canonical"], "others for each size of another axis, so that must be fixed"),
        ("tensor", [MODEL_AXIS], "for the package's GPT, and no param here matches 'attention/qkv/kernel'"),
        (
            "tensor",
            [MODEL_AXIS, "layout.rules=[('Dens_0/kernel', (None, 'model'))]"],
            "the nearest to 'Dens_0/kernel' is params/Dense_0/kernel of shape (6, 8)",
        ),
        (
            "tensor",
            [MODEL_AXIS, "layout.rules=[('Dense_0/kernel', ('model',))]"],
            "dim 0 has length 6, which is not divisible by 4, the size of mesh axis 'model'. Shard dim 1 instead or "
            "make the dim 4 or 8",
        ),
        ("tensor", ["layout.rules=[('kernel', ('modle',))]"], "needs the mesh axes data, modle"),
        ("tensor", ["layout.rules=kernel"], "layout.rules takes"),
        ("tensor", ["layout.rules=[('(kernel', ('model',))]"], "'(kernel' is not one: missing )"),
        ("fsdp", [MODEL_AXIS], "has no use for the mesh axes model"),
        ("fsdp", ["layout.rules=[('kernel', ('data',))]"], "rules belong to strategy 'tensor'"),
        ("fsdp", ["layout.names={'embed': 'data'}"], "'embed' is not one. They name none"),
        ("data-parallel", ["layout.names={'embed': 'data'}"], "names have no use"),
        ("fsdp", ["layout.min_size=-1"], "layout.min_size must be at least 0"),
    ],
)
def test_what_cannot_be_laid_out_is_the_users_mistake(capsys, tmp_path, strategy, settings, message):
    arguments = ["train", TINY, "--devices", "8", "--strategy", strategy, "--run-dir", str(tmp_path / "run")]
    assert main.run([*arguments, *(["--set", *settings] if settings else [])]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert not (tmp_path / "run").exists()
    if strategy == "pipeline":
        assert all(f"{name}: {purpose}" in shown.err for name, purpose in strategies.PURPOSES.items())
