import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from small_states import MESH, P, bits, make_state, saved_steps, small_state, template_of

from jaxdist.checkpoint.checkpoints import Checkpointer, CheckpointError
from jaxdist.guards import recompile, replicas
from jaxdist.spmd.mesh import make_mesh
from jaxdist.spmd.state import abstract_state, create_state
from jaxdist.spmd.step import data_parallel_step

LAYOUTS = {
    "replicated": (MESH, P()),
    "one device": (make_mesh(devices=jax.devices()[:1]), P()),
    "two devices": (make_mesh(devices=jax.devices()[:2]), P(None, "data")),
    "rows": (MESH, P("data")),
    "columns and copies": (make_mesh({"data": 2, "model": 4}), P(None, "model")),
    "blocks": (make_mesh({"data": 4, "model": 2}), P("data", "model")),
}


@pytest.mark.parametrize("written", LAYOUTS)
def test_what_is_restored_is_what_was_saved_to_the_bit_on_any_layout(tmp_path, written):
    state = make_state(*LAYOUTS[written])
    with Checkpointer(tmp_path, identity="test") as checkpointer:
        checkpointer.save(3, state, {"epoch": 1, "seeds": [1, 2]}, {"loss": float("nan")})
        for read in LAYOUTS.values():
            template = template_of(state, *read)
            restored, data_state = checkpointer.restore(template)
            assert data_state == {"epoch": 1, "seeds": [1, 2]}
            assert jax.tree.structure(restored) == jax.tree.structure(state)
            assert bits(restored) == bits(state)
            for leaf, struct in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
                assert leaf.sharding == struct.sharding


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_kind_come_back(tmp_path, impl):
    sharding = NamedSharding(MESH, P())
    state = {"key": jax.device_put(jax.random.key(5, impl=impl), sharding)}
    state["keys"] = jax.device_put(jax.random.split(state["key"], (2, 3)), sharding)
    with Checkpointer(tmp_path, identity="test") as checkpointer:
        checkpointer.save(1, state, {}, {})
        restored, _ = checkpointer.restore(template_of(state))
    assert bits(restored) == bits(state)
    assert jax.random.key_impl(restored["key"]) == jax.random.key_impl(state["key"])


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    """Views of donated memory, written while the next steps run, would contain the values of those steps."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    for sharding in (NamedSharding(MESH, P()), NamedSharding(MESH, P("data"))):
        state = step(jax.device_put({"w": jnp.zeros((8, 1 << 16)), "n": jnp.zeros(8, jnp.int32)}, sharding))
        with Checkpointer(tmp_path / str(sharding.spec), identity="test", keep_last=9) as checkpointer:
            for number in range(1, 4):
                checkpointer.save(number, state, {}, {})
                for _ in range(3):
                    state = step(state)
            for number in range(1, 4):
                restored, _ = checkpointer.restore(template_of(state), number)
                assert all((np.asarray(leaf) == 3 * number - 2).all() for leaf in jax.tree.leaves(restored))


def loss_fn(params, batch, key):
    return jnp.square(batch["x"] @ params["w"]).mean(), {}


def test_training_goes_on_from_a_restored_state_as_if_it_had_not_stopped(tmp_path):
    """The same bits, the same program, and nothing shared between the devices' copies (donation would show it)."""
    optimizer = optax.adamw(0.1)
    init = lambda key: {"w": jax.random.normal(key, (3, 2))}  # noqa: E731
    step, sentinel = data_parallel_step(loss_fn, optimizer, MESH), recompile.RecompileSentinel()
    batch = jax.device_put({"x": np.arange(24, dtype=np.float32).reshape(8, 3)}, NamedSharding(MESH, P("data")))
    state = create_state(init, optimizer, mesh=MESH, seed=0)
    with Checkpointer(tmp_path, identity="test") as checkpointer:
        checkpointer.save(0, state, {}, {})
        for _ in range(3):
            sentinel.observe(step, (state, batch))
            state, _ = step(state, batch)
        restored, _ = checkpointer.restore(abstract_state(init, optimizer, mesh=MESH))
    for _ in range(3):
        old, (restored, _) = restored, step(restored, batch)
        assert sentinel.observe(step, (old, batch)) is None
        replicas.check_replicas(restored, MESH)
    assert bits(restored) == bits(state)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keep_last=st.integers(1, 3),
    keep_every=st.sampled_from([None, 2, 3]),
    mode=st.sampled_from(["max", "min"]),
    scores=st.lists(st.sampled_from([None, 0.0, 1.0, 2.0, float("nan")]), min_size=1, max_size=6),
)
def test_the_last_the_every_nth_and_the_best_step_stay(tmp_path_factory, keep_last, keep_every, mode, scores):
    directory = tmp_path_factory.mktemp("steps")
    options = {"keep_last": keep_last, "keep_every": keep_every, "best_metric": "accuracy", "best_mode": mode}
    state = small_state(0)
    expected: set[int] = set()
    best = None
    for step, score in enumerate(scores, start=1):
        # A new Checkpointer each time: nothing may depend on the memory of an earlier one.
        with Checkpointer(directory, identity="test", **options) as checkpointer:
            checkpointer.save(step, state, {}, {} if score is None else {"accuracy": score})
        if score is not None and score == score:
            better = best is None or (score > scores[best - 1] if mode == "max" else score < scores[best - 1])
            best = step if better else best
        kept_by_age = sorted(expected | {step})[-keep_last:]
        expected = {
            kept
            for kept in expected | {step}
            if kept in kept_by_age or kept == best or (keep_every and kept % keep_every == 0)
        }
        assert checkpointer.steps() == sorted(expected)
        assert checkpointer.best_step() == best
        assert checkpointer.latest_step() == step


def test_a_step_saved_again_counts_with_its_new_metrics(tmp_path):
    with Checkpointer(tmp_path, identity="test", keep_last=3, best_metric="accuracy") as checkpointer:
        for step, accuracy in ((1, 0.9), (2, 0.8), (1, 0.1)):
            checkpointer.save(step, small_state(step), {}, {"accuracy": accuracy})
            checkpointer.wait()
            assert checkpointer.best_step() == (2 if accuracy < 0.5 else 1)


def test_a_twentieth_of_the_time_is_told_from_what_a_save_took(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    with Checkpointer(tmp_path, identity="test", clock=lambda: clock.now) as checkpointer:
        assert checkpointer.may_save(0.05), "there was none"
        finish = checkpointer._finish

        def slow(*arguments):
            clock.now += 2.0
            finish(*arguments)

        monkeypatch.setattr(checkpointer, "_finish", slow)
        checkpointer.save(1, small_state(1), {}, {})
        checkpointer.wait()
        clock.now = 139.9
        assert not checkpointer.may_save(0.05)
        clock.now = 140.1
        assert checkpointer.may_save(0.05)


def test_a_damaged_manifest_does_not_stop_saving_and_is_nobodys_best(tmp_path):
    with Checkpointer(tmp_path, identity="test", keep_last=2, best_metric="accuracy") as checkpointer:
        checkpointer.save(1, small_state(1), {}, {"accuracy": 0.9})
    (tmp_path / "1" / "manifest" / "process-0.json").write_text("{")
    with Checkpointer(tmp_path, identity="test", keep_last=2, best_metric="accuracy") as checkpointer:
        checkpointer.save(2, small_state(2), {}, {"accuracy": 0.1})
        checkpointer.wait()
        assert checkpointer.best_step() == 2
        assert checkpointer.steps() == [1, 2]


def test_a_run_that_went_back_keeps_its_own_newest_step(tmp_path):
    saved_steps(tmp_path, 1, 5, keep_last=3)
    with Checkpointer(tmp_path, identity="test", keep_last=1) as checkpointer:
        checkpointer.save(2, small_state(2), {}, {})
        checkpointer.wait()
        assert checkpointer.steps() == [2, 5]


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    saved_steps(tmp_path, 4)
    for value in (8, 9):
        with Checkpointer(tmp_path, identity="test") as checkpointer:
            checkpointer.save(4, small_state(value), {"value": value}, {})
            restored, data_state = checkpointer.restore(template_of(small_state(0)))
        assert bits(restored) == bits(small_state(value))
        assert data_state == {"value": value}
        assert checkpointer.steps() == [4]
        assert len(list(tmp_path.iterdir())) == 1


def test_only_committed_steps_count(tmp_path):
    saved_steps(tmp_path, 1)
    for name in ("draft-2", "removed-3", "notes", "4.5.6", "007"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    checkpointer = Checkpointer(tmp_path, identity="test")
    assert checkpointer.steps() == [1]
    checkpointer.save(5, small_state(5), {}, {})
    checkpointer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["007", "1", "4.5.6", "5", "notes"]


def test_nothing_to_restore_is_said(tmp_path):
    checkpointer = Checkpointer(tmp_path / "none", identity="test")
    assert (checkpointer.latest_step(), checkpointer.best_step()) == (None, None)
    with pytest.raises(CheckpointError, match=r"There is no checkpoint in .*none"):
        checkpointer.restore(template_of(small_state(0)))
    assert not (tmp_path / "none").exists()
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 2 in .* it holds steps \[1\]"):
        Checkpointer(saved_steps(tmp_path, 1), identity="test").restore(template_of(small_state(0)), step=2)
