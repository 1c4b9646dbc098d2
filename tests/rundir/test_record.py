"""The run record: written whole or not at all, strict JSON, equal for equal runs; accounts that add up."""

import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import pathlib
import resource
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxdist.data import ArraySource
from jaxdist.rundir import record

CONTRACT = [
    *("end_reason", "step", "examples_seen", "params_sha256", "metrics", "strategy", "reduction", "num_devices"),
    *("num_processes", "examples_per_second", "step_seconds", "time_seconds", "compile_count", "restarts", "config"),
    *("versions", "command"),
]


def example(**changes):
    values = {
        "end_reason": None,
        "step": 3,
        "examples_seen": 96,
        "params_sha256": "00",
        "metrics": {"train/loss": 0.5},
        "strategy": "data-parallel",
        "reduction": "mean",
        "num_devices": 8,
        "num_processes": 1,
        "examples_per_second": 10.0,
        "step_seconds": {"p50": 0.1, "p95": 0.2},
        "time_seconds": {"input": 1.0, "compute": 2.0},
        "compile_count": 1,
        "restarts": 0,
        "config": {"seed": 0},
        "versions": record.versions(),
        "command": "jaxdist train x.py",
    }
    return record.RunRecord(**(values | changes))


def strict(path: pathlib.Path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_the_file_has_the_contracts_keys_and_reads_back(tmp_path):
    written = example(end_reason="target_reached", extra={"ps": {"updates": 7}})
    path = written.write(tmp_path)
    assert path == tmp_path / "run.json"
    assert list(strict(path)) == [*CONTRACT, "ps"]
    assert record.RunRecord.read(tmp_path) == written
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_numbers_that_json_cannot_hold_are_null(tmp_path):
    metrics = {"a": math.nan, "b": -math.inf, "c": jnp.float32(0.5), "d": np.float64(1.5), "e": 2}
    path = example(metrics=metrics, config={"max_seconds": math.inf}).write(tmp_path)
    content = strict(path)
    assert content["metrics"] == {"a": None, "b": None, "c": 0.5, "d": 1.5, "e": 2}
    assert content["config"] == {"max_seconds": None}


def test_a_record_that_breaks_the_contract_is_refused():
    with pytest.raises(ValueError, match="target_reached"):
        example(end_reason="finished")
    with pytest.raises(ValueError, match="step"):
        example(extra={"step": 4})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"end_reason": null, "ste', "must be JSON"),
        (b"\xff\xfe\x00", "must be JSON"),
        (b"[1, 2]", "JSON object"),
        (b'{"end_reason": null}', "lacks step, examples_seen"),
        (json.dumps(example().to_json() | {"end_reason": "bored"}).encode(), "bored"),
        (json.dumps(example().to_json() | {"metrics": {"a": "b"}}).encode(), "metrics.a must be a number, got 'b'"),
        (json.dumps(example().to_json() | {"best": {"metric": "a", "step": 1}}).encode(), "best lacks value"),
        (b"[" * 100_000, "must be JSON"),
    ],
)
def test_a_damaged_or_foreign_file_is_named(tmp_path, content, complaint):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        record.RunRecord.read(tmp_path)
    assert str(tmp_path / "run.json") in str(caught.value)


def test_a_write_that_fails_leaves_the_older_record(tmp_path):
    example(step=1).write(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # the nearest thing to a full disk that needs no disk
    try:
        with pytest.raises(OSError, match=r"run\.json") as caught:
            example(step=2).write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert record.RunRecord.read(tmp_path).step == 1
    example(step=3).write(tmp_path)  # takes over the torn draft
    assert record.RunRecord.read(tmp_path).step == 3


def test_the_record_appears_only_by_a_rename(tmp_path, monkeypatch):
    example(step=1).write(tmp_path)
    seen = []

    def replace(source, target):
        seen.append((strict(pathlib.Path(target))["step"], strict(pathlib.Path(source))["step"]))
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    example(step=2).write(tmp_path)
    assert seen == [(1, 2)]


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        example().write(tmp_path / "nowhere")


def tree(rng):
    return {
        "b": rng.standard_normal((8, 3)).astype(np.float32),
        "a": [rng.integers(0, 9, (16,), np.int32), np.float32(1.5)],
        "c": rng.standard_normal((8, 2)).astype(jnp.bfloat16),
        "d": np.zeros((0, 4), np.float32),
    }


def test_the_hash_is_of_the_bytes_however_the_leaves_lie():
    params = tree(np.random.default_rng(0))
    expected = hashlib.sha256(b"".join(np.asarray(leaf).tobytes("C") for leaf in jax.tree.leaves(params))).hexdigest()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def place(leaf):
        spec = PartitionSpec("data") if leaf.ndim and leaf.shape[0] % 8 == 0 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    assert record.params_sha256(params) == expected
    assert record.params_sha256(jax.device_put(params)) == expected
    assert record.params_sha256(jax.device_put(params, NamedSharding(mesh, PartitionSpec()))) == expected
    assert record.params_sha256(jax.tree.map(place, params)) == expected
    fortran = jax.tree.map(lambda leaf: np.asfortranarray(leaf), params)
    assert record.params_sha256(fortran) == expected


def test_the_hash_sees_one_bit():
    params = tree(np.random.default_rng(0))
    other = tree(np.random.default_rng(0))
    other["b"][7, 2] = np.nextafter(other["b"][7, 2], np.float32(9))
    assert record.params_sha256(params) != record.params_sha256(other)
    assert record.params_sha256({"key": jax.random.key(0)}) != record.params_sha256({"key": jax.random.key(1)})


def test_versions_name_what_shapes_the_numbers():
    versions = record.versions()
    assert list(versions) == ["python", "jax", "jaxlib", "flax", "optax", "numpy", "jaxdist"]
    assert versions["jax"] == jax.__version__
    assert all(versions.values())


class Inner(nn.Module):
    features: int = 3
    activation: object = nn.relu


@dataclasses.dataclass(frozen=True)
class Config:
    model: nn.Module
    where: pathlib.Path = pathlib.Path("data/x")
    sizes: tuple[int, ...] = (1, 2)
    labels: frozenset = frozenset({"b", "a"})
    loss: object = functools.partial(nn.relu, 2)
    weights: object = None
    secret: str = dataclasses.field(default="s", repr=False)


def test_a_config_becomes_plain_data():
    plain = record.plain(Config(Inner(), weights=jnp.zeros((2, 3))))
    json.dumps(plain, allow_nan=False)
    module = __name__
    relu = record.qualified_name(nn.relu)
    assert plain == {
        "class": f"{module}.Config",
        "model": {"class": f"{module}.Inner", "features": 3, "activation": relu, "name": None},
        "where": "data/x",
        "sizes": [1, 2],
        "labels": ["a", "b"],
        "loss": {"class": "functools.partial", "func": relu, "args": [2], "keywords": {}},
        "weights": {"shape": [2, 3], "dtype": "float32"},
    }


@dataclasses.dataclass(frozen=True)
class Hub:
    api_key: str = "k-1"
    options: dict = dataclasses.field(default_factory=lambda: {"db.password": "k-2", "rows": 3})
    call: object = functools.partial(nn.relu, access_token="k-3")
    pad_token: str = "<pad>"
    use_token: bool = True
    next_token: int = 7


def test_what_is_named_like_a_secret_is_hidden_wherever_it_stands():
    plain = record.plain({"data": [Hub()]})
    assert "k-" not in json.dumps(plain)
    (hub,) = plain["data"]
    assert (hub["api_key"], hub["options"]) == (record.HIDDEN, {"db.password": record.HIDDEN, "rows": 3})
    assert hub["call"]["keywords"] == {"access_token": record.HIDDEN}
    assert (hub["pad_token"], hub["use_token"], hub["next_token"]) == ("<pad>", True, 7)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.dtype("float32"), "float32"),
        (jnp.bfloat16, "jax.numpy.bfloat16"),
        (len, "builtins.len"),
        (dict.fromkeys, "builtins.dict.fromkeys"),
        (object(), "builtins.object"),
        (jax.random.key(0), {"shape": [], "dtype": "key<fry>"}),
        ({1: {2.5}}, {"1": [2.5]}),
    ],
)
def test_single_values(value, expected):
    assert record.plain(value) == expected


def test_a_script_has_one_name_however_it_is_started(tmp_path):
    script = tmp_path / "digits.py"
    script.write_text("from jaxdist.rundir import record\nclass Config: pass\nprint(record.qualified_name(Config))\n")
    for command in (["digits.py"], ["-c", "import digits"]):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=200
        )
        assert done.stdout == "digits.Config\n"


def test_what_the_numbers_of_the_data_stand_for_is_in_the_config():
    source = ArraySource({"label": np.arange(2)})
    assert record.plain(source) == "jaxdist.data.sources.source.ArraySource"
    source.vocabulary = {"label": ("cat", "dog")}
    assert record.plain(source) == {
        "class": "jaxdist.data.sources.source.ArraySource",
        "vocabulary": {"label": ["cat", "dog"]},
    }


@dataclasses.dataclass(frozen=True)
class Part:
    width: int = 64
    groups: tuple = ()


@dataclasses.dataclass(frozen=True)
class Whole:
    inner: object = Part()
    loss: object = math.hypot
    rate: float | None = None


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (Whole(), []),
        (Whole(inner=Part(width=32), rate=0.5), ["x.inner.width 64 -> 32", "x.rate None -> 0.5"]),
        (Whole(loss=len), ["x.loss math.hypot -> builtins.len"]),
        (Whole(inner=Whole()), ["x.inner test_record.Part -> test_record.Whole"]),
        (Whole(inner=Part(groups=(1, 2))), ["x.inner.groups [] -> [1, 2]"]),
        (Part(), ["x test_record.Whole -> test_record.Part"]),
    ],
)
def test_differences_name_the_settings(now, expected):
    found = record.differences("x", record.plain(Whole()), record.plain(now))
    assert [each.replace(f"{__name__}.", "test_record.") for each in found] == expected


def test_differences_look_into_lists_and_name_what_is_not_set():
    then, now = {"groups": [{"rate": 1}, {"rate": 2}], "old": 3}, {"groups": [{"rate": 1}, {"rate": 4}], "new": 5}
    assert record.differences("x", then, now) == ["x.groups.1.rate 2 -> 4", "x.old 3 -> not set", "x.new not set -> 5"]
