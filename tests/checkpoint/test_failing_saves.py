"""Saves that fail, are killed, or are made by two processes together."""

import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_states import MESH, P, bits, key_struct, saved_steps, small_state, template_of

from jaxdist.checkpoint.checkpoints import Checkpointer, CheckpointError, DamagedCheckpointError
from jaxdist.launch.supervising import local_job


@pytest.fixture
def tiny_disk():
    """Return a function that lets no file grow beyond 64 KiB until it is called with None: a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16 if full else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("surface", ["save", "wait", "close", "restore"])
def test_a_save_that_fails_is_reported_and_harms_nothing(tmp_path, tiny_disk, surface, caplog, capfd):
    checkpointer = Checkpointer(tmp_path, identity="test")
    checkpointer.save(1, small_state(1, 1 << 16), {}, {})
    checkpointer.wait()
    tiny_disk(True)
    checkpointer.save(2, small_state(2, 1 << 16), {}, {})
    arguments = {"save": (3, small_state(3), {}, {}), "restore": (template_of(small_state(0, 1 << 16)),)}
    with pytest.raises(CheckpointError, match="A checkpoint of step 2 could not be written to") as error:
        getattr(checkpointer, surface)(*arguments.get(surface, ()))
    tiny_disk(False)
    assert str(tmp_path) in str(error.value)
    assert "Step 1 is intact" in str(error.value)
    assert checkpointer.steps() == [1]
    if surface != "close":
        checkpointer.save(2, small_state(5, 1 << 16), {}, {})
        checkpointer.close()
    restored, _ = Checkpointer(tmp_path, identity="test").restore(template_of(small_state(0, 1 << 16)))
    assert bits(restored) == bits(small_state(1 if surface == "close" else 5, 1 << 16))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr().err == ""


def test_a_directory_that_cannot_be_written_is_named_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("no directory")
    checkpointer = Checkpointer(tmp_path / "file", identity="test")
    with pytest.raises(CheckpointError, match=r"could not be written to .*/file: .*It holds no earlier checkpoint"):
        checkpointer.save(1, small_state(1), {}, {})


KILLED_SAVE = """
    import os, pathlib, shutil, signal, sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    from jaxdist.checkpoint import checkpoints as checkpoint
    from jaxdist.spmd import mesh

    source, target = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    step, events = int(sys.argv[3]), sys.argv[4].split()

    def save(directory, last_event):
        w = jax.device_put(jnp.full(4, 9.0), NamedSharding(mesh.make_mesh(), PartitionSpec()))
        state = {"params": {"w": w, "b": w[:2] + 1}, "key": jax.device_put(jax.random.key(9), w.sharding)}
        count = 0

        def kill_at_last_event(event, args):
            nonlocal count
            if event in events and (event != "open" or args[1] in ("w", "xb")) and str(directory) in str(args[0]):
                count += 1
                if count == last_event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill_at_last_event)
        with checkpoint.Checkpointer(directory, identity="test", keep_last=1) as checkpointer:
            checkpointer.save(step, state, {"position": 9}, {})

    # Importing is slow, so it is done once; the backend is started by each child, after the fork.
    for last_event in range(1, 200):
        directory = target / str(last_event)
        shutil.copytree(source, directory)
        child = os.fork()
        if child == 0:
            save(directory, last_event)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))
        assert os.WTERMSIG(status) == signal.SIGKILL
"""


@pytest.mark.parametrize(
    ("step", "events", "at_least"),
    [(2, "open os.mkdir os.remove os.rename os.rmdir shutil.rmtree", 10), (1, "os.rename os.rmdir shutil.rmtree", 5)],
    ids=["a new step", "the same step again"],
)
def test_a_save_killed_at_any_moment_leaves_the_old_state_or_the_new_one(tmp_path, step, events, at_least):
    """SIGKILL at each of the file operations of a save: making, writing, renaming and removing, one run for each."""
    source, target = saved_steps(tmp_path / "source", 1), tmp_path / "target"
    target.mkdir()
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        textwrap.dedent(KILLED_SAVE),
        str(source),
        str(target),
        str(step),
        events,
    ]
    child = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert child.returncode == 0, child.stderr
    old, new = bits(small_state(1)), bits(small_state(9))
    outcomes = []
    for directory in sorted(target.iterdir(), key=lambda path: int(path.name)):
        with Checkpointer(directory, identity="test") as checkpointer:
            restored, data_state = checkpointer.restore(template_of(small_state(0)))
            is_new = bits(restored) == new
            assert bits(restored) in (old, new)
            assert data_state == {"position": 9 if is_new else 1}
            assert all(checkpointer.verify(kept) is None for kept in checkpointer.steps())
            outcomes.append(is_new)
    assert not outcomes[0]  # Killed before it began.
    assert outcomes[-1]  # Not killed at all.
    assert len(outcomes) > at_least
    with Checkpointer(target / "5", identity="test") as checkpointer:
        checkpointer.save(3, small_state(3), {}, {})
    left_behind = [path.name for path in (target / "5").iterdir() if not path.name.replace(".", "").isdigit()]
    assert left_behind == []


PROCESS = """
    import resource
    import sys
    import time
    import jax
    process, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize("127.0.0.1:" + port, 2, process)
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec as P
    from jaxdist.checkpoint import checkpoints as checkpoint
    from jaxdist.guards import replicas
    from jaxdist.spmd import mesh

    def no_device_barrier(name):
        raise AssertionError("a barrier on the devices")

    multihost_utils.sync_global_devices = no_device_barrier
    over = mesh.make_mesh()
    whole = np.arange(64, dtype=np.float32).reshape(8, 8)

    def put(values, spec):
        return jax.make_array_from_callback(values.shape, NamedSharding(over, spec), lambda index: values[index])

    specs = {"whole": P(), "rows": P("data"), "columns": P(None, "data")}
    state = {name: put(whole, spec) for name, spec in specs.items()}
    state["key"] = jax.jit(lambda: jax.random.key(3), out_shardings=NamedSharding(over, P()))()
    superfluous = checkpoint.Checkpointer._superfluous

    def slowly(self, saved):
        time.sleep(0.3)  # No process may see the directory before process 0 has put it in order.
        return superfluous(self, saved)

    checkpoint.Checkpointer._superfluous = slowly
    with checkpoint.Checkpointer(directory, identity="test", keep_last=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, {"step": step}, {})
        checkpointer.wait()
        assert checkpointer.steps() == [2], checkpointer.steps()
        no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        for failing in (0, 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100 if process == failing else no_limit[0], no_limit[1]))
            checkpointer.save(3, state, {"step": 3}, {})
            try:
                checkpointer.wait()
                raise AssertionError("process", failing, "could not write")
            except checkpoint.CheckpointError as error:
                assert "of step 3 could not be written" in str(error), error
                assert "File too large" in str(error), error
            resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
            assert checkpointer.steps() == [2], checkpointer.steps()
        turned = {"whole": P("data"), "rows": P(None, "data"), "columns": P(), "key": P()}
        template = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(over, turned[name]))
            for name, leaf in state.items()
        }
        restored, data_state = checkpointer.restore(template)
        assert data_state == {"step": 2}
        for name in specs:
            for shard in restored[name].addressable_shards:
                assert np.array_equal(shard.data, whole[shard.index]), name
    replicas.check_replicas(restored, over)
    drifted = jax.make_array_from_process_local_data(NamedSharding(over, P()), whole + process)
    try:
        replicas.check_replicas({"drifted": drifted}, over)
    except replicas.ReplicaDriftError as error:
        print("process", process, error, flush=True)
"""


def test_two_processes_save_together_and_any_layout_restores_it(tmp_path):
    [port] = map(str, local_job.quiet_ports(1))
    command = [sys.executable, "-c", textwrap.dedent(PROCESS)]
    processes = [
        subprocess.Popen(
            [*command, str(i), port, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    for i, output in enumerate(outputs):
        assert f"process {i} The copies" in output
        assert all(f"(process {other})" in output for other in range(2))
    whole = np.arange(64, dtype=np.float32).reshape(8, 8)
    structs = {name: jax.ShapeDtypeStruct((8, 8), jnp.float32) for name in ("whole", "rows", "columns")}
    template = template_of(structs | {"key": key_struct(None)}, MESH, P("data"))
    restored, _ = Checkpointer(tmp_path, identity="test").restore(template)
    assert all(np.array_equal(restored[name], whole) for name in structs)
    os.unlink(tmp_path / "2" / "manifest" / "process-1.json")
    with pytest.raises(DamagedCheckpointError, match=r"lacks hashes of leaf (rows|columns)"):
        Checkpointer(tmp_path, identity="test").restore(template)
