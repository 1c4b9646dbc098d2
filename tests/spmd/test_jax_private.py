"""Every private name of JAX that the package uses, each called once: a new version of JAX is checked here first."""

import ast
import contextlib
import pathlib
import subprocess
import sys

import compile_cache
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import cache_key, compilation_cache, compiler
from jax.sharding import NamedSharding, PartitionSpec

import jaxdist
from jaxdist.spmd import device_program, jax_private
from jaxdist.spmd.mesh import make_mesh

PACKAGE = pathlib.Path(jaxdist.__file__).parent


def lowered_double():
    return jax.jit(lambda x: 2 * x, keep_unused=True).lower(jax.ShapeDtypeStruct((3,), np.float32))


def imports_private_modules(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    imported = [name for node in nodes for name in names_of(node)]
    return any(name.startswith("jax._src") for name in imported)


def names_of(node):
    if isinstance(node, ast.ImportFrom):
        return [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_it_is_the_only_module_that_imports_private_ones():
    importers = [path for path in PACKAGE.rglob("*.py") if imports_private_modules(path)]
    assert importers == [PACKAGE / "spmd" / "jax_private.py"]


def test_every_function_is_tested_here():
    tree = ast.parse((PACKAGE / "spmd" / "jax_private.py").read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    tests = pathlib.Path(__file__).read_text()
    assert [name for name in functions if f"jax_private.{name}(" not in tests] == []


def test_outside_a_job_there_is_no_store_and_one_process():
    assert jax_private.coordinator_store() is None
    assert jax_private.process_of_job() == (0, 1)


JOB_OF_ONE = """
import jax
from jaxdist.launch.supervising import local_job
from jaxdist.spmd import device_program, jax_private
address = f"127.0.0.1:{local_job.quiet_ports(1)[0]}"
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, num_processes=1, process_id=0, cluster_detection_method="deactivate")
store = jax_private.coordinator_store()
assert jax_private.process_of_job() == (0, 1)
store.key_value_set("a", "1")
store.key_value_set("a", "2", allow_overwrite=True)
assert store.key_value_try_get("a") == "2" == store.blocking_key_value_get("a", 1000)
try:
    store.key_value_set("a", "3")
except jax.errors.JaxRuntimeError as error:
    assert "ALREADY_EXISTS" in str(error)
try:
    store.key_value_try_get("b")
except jax.errors.JaxRuntimeError as error:
    assert "NOT_FOUND" in str(error)
store.wait_at_barrier("b", 1000)
jax_private.use_gloo_at("127.0.0.1")
assert not jax_private.has_started()
assert float(jax.numpy.ones(3).sum()) == 3.0
assert jax_private.has_started()
"""


def test_in_a_job_the_store_keeps_values_and_gloo_listens_where_it_is_told_once_jax_has_started():
    done = subprocess.run([sys.executable, "-c", JOB_OF_ONE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_engines_are_the_ones_we_have_names_for():
    names = {engine.__name__ for engine in jax_private.known_engines()}
    assert {"OmpiCluster", "SlurmCluster", "GkeTpuCluster", "GceTpuCluster", "K8sCluster"} <= names
    for engine in jax_private.known_engines():
        assert engine.is_env_present() is False or engine.opt_in_only_method
    assert jax_private.is_on_cloud_tpu() is False


def test_a_module_compiled_for_one_device_is_loaded_on_several():
    devices = jax.devices()[:2]
    compiled = jax_private.compile_module(lowered_double().compiler_ir(), devices[:1])
    device_list, options = jax_private.placement(devices)
    assert (len(device_list), options.num_replicas, options.num_partitions) == (2, 2, 1)
    mesh = make_mesh(devices=devices)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    aval = jax.core.ShapedArray((6,), jnp.float32)
    loaded = jax_private.load_executable(compiled.serialize(), devices)
    program = jax_private.mesh_executable(loaded, mesh, [aval], [sharding], [aval], [sharding])
    (result,) = program.call(jax.device_put(np.arange(6, dtype=np.float32), sharding))
    for shard, expected in zip(result.addressable_shards, ([0, 2, 4], [6, 8, 10]), strict=True):
        np.testing.assert_array_equal(shard.data, expected)


def test_a_lowered_program_travels_as_bytes():
    lowered = lowered_double()
    device = jax.devices()[0]
    content = jax_private.module_bytes(lowered.compiler_ir())
    module = jax_private.module_of(content)
    assert jax_private.module_bytes(module) == content
    assert b"test_jax_private" not in content  # the lines of code
    loaded = jax_private.compile_module(module, [device])
    found = loaded.execute([jax.device_put(np.arange(3, dtype=np.float32), device)])
    np.testing.assert_array_equal(found[0], [0, 2, 4])


def test_what_a_program_uses_of_its_process_and_whether_it_has_an_order_are_known():
    def calls(x, ordered):
        jax.debug.callback(print, x, ordered=ordered)
        return x

    assert not any(jax_private.python_of(lowered_double()))
    called = jax.jit(calls, static_argnums=1).lower(np.float32(1), False)
    assert len(jax_private.python_of(called).callbacks) == 1
    for ordered in (False, True):
        assert jax_private.has_order(jax.make_jaxpr(calls, static_argnums=1)(1.0, ordered).jaxpr) == ordered


def test_the_cache_gives_back_what_was_put_there(tmp_path):
    device = jax.devices()[0]
    with compile_cache.compile_once(tmp_path):
        module = lowered_double().compiler_ir()
        key = jax_private.cache_key(module, device)
        assert jax_private.read_cache(key, [device]) is None
        compiled = jax_private.compile_module(module, [device])
        jax_private.write_cache(key, "double", compiled, device, seconds=1.0)
        assert jax_private.read_cache(key, jax.devices()[:2]) is not None
        assert len(list(tmp_path.iterdir())) >= 1
        jax_private.remove_from_cache(key)
        jax_private.remove_from_cache(key)
        assert jax_private.read_cache(key, [device]) is None


@pytest.fixture
def jax_keys(monkeypatch):
    for name in ("_hash_accelerator_config", "_hash_serialized_compile_options"):
        now = getattr(cache_key, name)
        monkeypatch.setattr(cache_key, name, getattr(now, "by_jax", now))


def key_on(*numbers):
    """Return the key of a program on these devices, as `jax.jit` makes it."""
    devices = [jax.devices()[number] for number in numbers]
    assignment = np.array([[device.id for device in devices]])
    options = compiler.get_compile_options(1, len(devices), assignment, backend=devices[0].client)
    return compilation_cache.get_cache_key(
        lowered_double().compiler_ir(), np.array(devices), options, devices[0].client
    )


def test_cached_programs_of_one_device_are_shared_by_all(jax_keys, tmp_path):
    with compile_cache.compile_once(tmp_path):
        assert key_on(0) != key_on(3)  # else there is no need for this any more
        jax_private.share_cache_keys("a processor")
        jax_private.share_cache_keys("a processor")
        keys = [key_on(0), key_on(3), key_on(0, 1), key_on(1, 0), key_on(0, 1, 2, 3)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def test_cached_programs_belong_to_a_kind_of_processor(jax_keys, tmp_path, monkeypatch):
    with compile_cache.compile_once(tmp_path):
        jax_private.share_cache_keys("a processor")
        here = key_on(0)
        monkeypatch.undo()
        jax_private.share_cache_keys("another one")
        assert key_on(0) != here


@pytest.fixture
def compiling(monkeypatch):
    """Take back what `take_turns_compiling` changes."""
    now = compiler._compile_and_write_cache
    monkeypatch.setattr(compiler, "_compile_and_write_cache", getattr(now, "by_jax", now))


def jitted():
    jax.jit(lambda x: jnp.sin(x) + 1)(np.arange(3, dtype=np.float32)).block_until_ready()


def replicated():
    mesh, whole = make_mesh(devices=jax.devices()[:2]), PartitionSpec()
    x = jax.device_put(np.arange(3, dtype=np.float32), NamedSharding(mesh, whole))
    program = device_program.PerDeviceProgram(lambda x: jnp.sin(x) + 2, mesh, in_specs=(whole,), out_spec=whole)
    program(x).block_until_ready()


@pytest.mark.parametrize("compute", [jitted, replicated])
def test_a_program_that_another_process_compiles_at_its_turn_is_loaded(compute, compiling, tmp_path):
    with compile_cache.compile_once(tmp_path):
        compute()
        entries = {path: path.read_bytes() for path in tmp_path.iterdir()}
        for path in entries:
            path.unlink()
        jax.clear_caches()

        @contextlib.contextmanager
        def turn(key):
            (path,) = (path for path in entries if key in path.name)
            path.write_bytes(entries[path] + b" ")  # unlike what would be written here
            yield
            assert path.read_bytes() == entries[path] + b" "
            turns.append(key)

        turns = []
        with jax_private.turn_to_compile("no turns yet"):
            jax_private.take_turns_compiling(turn)
        jax_private.take_turns_compiling(turn)
        compute()
    assert len(turns) == len(entries) > 0


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_an_entry_that_is_damaged_is_written_again(compiling, tmp_path):
    with compile_cache.compile_once(tmp_path):
        jitted()
        (path,) = tmp_path.iterdir()
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        jax.clear_caches()
        jax_private.take_turns_compiling(lambda key: contextlib.nullcontext())
        jitted()
        assert len(path.read_bytes()) > len(whole) // 2


def test_constants_and_carry_of_a_scan_are_counted():
    def looped(a, b):
        return jax.lax.scan(lambda carry, x: ({"n": (carry["n"][0] + x * b, a)}, x), {"n": (a, a)}, jnp.ones(4))

    equations = jax.make_jaxpr(looped)(1.0, 2.0).jaxpr.eqns
    (scan,) = [each for each in equations if each.primitive.name == "scan"]
    assert jax_private.scan_counts(scan.params) == (2, 2)


def test_an_array_of_parts_is_that_of_device_put():
    sharding = NamedSharding(make_mesh({"data": 4}, devices=jax.devices()[:4]), PartitionSpec(("data",)))
    whole = np.arange(24, dtype=np.float32).reshape(8, 3)
    expected = jax.device_put(whole, sharding)
    found = jax_private.array_of_parts(whole.shape, sharding, jax.devices()[:4], np.split(whole, 4))
    np.testing.assert_array_equal(found, expected)
    assert jax_private.global_form(whole.shape, whole.dtype, sharding) == expected.aval
    assert (found.aval, found.sharding, found.committed) == (expected.aval, expected.sharding, True)


def test_an_equation_is_evaluated():
    closed = jax.make_jaxpr(lambda a: jnp.split(jax.jit(jnp.sin)(a), 2))(jnp.ones(4))
    values = [jnp.arange(4.0)]
    for equation in closed.jaxpr.eqns:
        values = jax_private.results_of(equation, values)
    np.testing.assert_allclose(np.concatenate(values), np.sin(np.arange(4.0)), rtol=1e-6)


def test_the_lines_of_code_of_an_equation_are_known():
    (equation,) = jax.make_jaxpr(lambda x: x + 1)(1.0).jaxpr.eqns
    lines = jax_private.lines_of(equation)
    assert any(file == __file__ and function.endswith("<lambda>") for file, _, function in lines)
