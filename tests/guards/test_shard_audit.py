"""The audit of a logical shard: every device computes it, and the one that is alone with its bits is named.

Faults are real ones as far as the program goes: one device's copy of an array holds other bits, or one device runs a
program in which an operator computes something else.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.guards import shard_audit, step_hashes
from jaxdist.spmd import layout as layouts
from jaxdist.spmd import step as steps
from jaxdist.spmd.canonical import adding, canonical_step
from jaxdist.spmd.mesh import Dealing, DealtBatch, make_mesh
from jaxdist.spmd.state import create_state

pytestmark = pytest.mark.usefixtures("shared_compilations")
SHARDS = 8


def init_fn(key):
    return {"in": jax.random.normal(key, (3, 5)), "out": jnp.ones(5)}


def make_loss(activation):
    def loss_fn(params, batch, key):
        return jnp.mean((activation(batch["x"] @ params["in"]) @ params["out"] - batch["y"]) ** 2), {}

    return loss_fn


def slightly_wrong(values):
    """Return the hyperbolic tangent, with an error in the last bits."""
    return jnp.tanh(values) * jnp.float32(1 + 2**-22)


class OneFaultyDevice:
    """A program that is another one on one device, from its first call on or in one call only."""

    def __init__(self, right, wrong, device, *, only_call=None):
        self._right, self._wrong, self._device, self._only = right, wrong, device, only_call
        self.calls = 0

    def __call__(self, *args):
        right = self._right(*args)
        self.calls += 1
        if self._only not in (None, self.calls):
            return right
        return jax.tree.map(self._joined, right, self._wrong(*args))

    def _joined(self, right, wrong):
        pieces = [
            (bad if bad.device == self._device else good).data
            for good, bad in zip(right.addressable_shards, wrong.addressable_shards, strict=True)
        ]
        return jax.make_array_from_single_device_arrays(right.shape, right.sharding, pieces)


class Setting:
    """A step and its audit on some devices."""

    def __init__(self, num_devices, activation=jnp.tanh):
        loss_fn = make_loss(activation)
        self.mesh = make_mesh(devices=jax.devices()[:num_devices])
        self.devices, optimizer = list(self.mesh.devices.flat), optax.adam(0.1)
        self.audit = shard_audit.ShardAudit(loss_fn, self.mesh, logical_shards=SHARDS, num_microbatches=1)
        hashing = step_hashes.StepHashing()
        self.step = canonical_step.canonical_step(loss_fn, optimizer, self.mesh, logical_shards=SHARDS, hashing=hashing)
        self.state = create_state(init_fn, optimizer, mesh=self.mesh, seed=0)
        random = np.random.default_rng(0)
        rows = {"x": random.normal(size=(16, 3)).astype("f4"), "y": random.normal(size=16).astype("f4")}
        dealing, sharding = Dealing(SHARDS, num_devices), NamedSharding(self.mesh, PartitionSpec("data"))
        if not dealing.is_even:
            rows = {name: field[dealing.rows(16)] for name, field in rows.items()}
        placed = jax.device_put(rows, sharding)
        self.batch = placed if dealing.is_even else DealtBatch(placed, dealing)

    def own_hashes(self):
        """Return what the step makes of each logical shard; it leaves the state of the setting as it is."""
        state = jax.tree.map(lambda leaf: jax.jit(jnp.copy)(leaf), self.state)
        return np.asarray(self.step(state, self.batch)[1][steps.STEP_HASHES])[:SHARDS]

    def any_device(self, random):
        """Return the position of a device, by chance."""
        return int(random.integers(len(self.devices)))

    def flipped(self, name, device, place, bit):
        """Return the state with one bit flipped in one device's copy of a param."""
        leaf = self.state.params[name]
        pieces = []
        for piece in leaf.addressable_shards:
            values = np.array(piece.data)
            if piece.device == device:
                values.reshape(-1).view("u4")[place % values.size] ^= np.uint32(1 << bit)
            pieces.append(jax.device_put(values, piece.device))
        other = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces)
        return steps.TrainState(
            self.state.step, {**self.state.params, name: other}, None, self.state.opt_state, self.state.key
        )


@functools.cache
def setting(num_devices, activation=jnp.tanh):
    """Four devices have two shards each; of three, one has two and two have three."""
    return Setting(num_devices, activation)


@functools.cache
def setting_in_stages(num_devices, activation=jnp.tanh):
    """Its step has a program for the shards alone, which can be made faulty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adding, "SMALL_SIZE", 0)
        made = Setting(num_devices, activation)
        made.own_hashes()  # compiles
    return made


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_honest_devices_agree_with_each_other_and_with_the_step(num_devices):
    honest = setting(num_devices)
    own = honest.own_hashes()
    for shard in range(SHARDS):
        votes = honest.audit.votes(honest.state, honest.batch, shard)
        assert votes.shape == (num_devices, 2)
        assert shard_audit.judge(votes, step=1, shard=shard) is None
        assert shard_audit.judge_step(votes, int(own[shard]), 0, step=1, shard=shard) is None


def check_params(setting, random):
    """A flipped bit in one device's copy of a param names that device, even if no gradient sees it."""
    name, device = str(random.choice(["in", "out"])), setting.any_device(random)
    state = setting.flipped(name, setting.devices[device], int(random.integers(15)), int(random.integers(32)))
    shard = int(random.integers(SHARDS))
    found = shard_audit.judge(setting.audit.votes(state, setting.batch, shard), step=3, shard=shard)
    assert found == shard_audit.Finding(3, shard, (device,), True, "params")


def check_operator(setting, wrong, random, *, lasting):
    """An operator that errs on one device names that device, in every audit or in the one in which it erred."""
    device, shard = setting.any_device(random), int(random.integers(SHARDS))
    honest = setting.audit._compute
    wrong.audit.votes(setting.state, setting.batch, shard)  # compiles
    faulty = OneFaultyDevice(honest, wrong.audit._compute, setting.devices[device], only_call=None if lasting else 2)
    setting.audit._compute = faulty
    try:
        audits = [setting.audit.votes(setting.state, setting.batch, shard) for _ in range(3)]
    finally:
        setting.audit._compute = honest
    found = [shard_audit.judge(votes, step=1, shard=shard) for votes in audits]
    named = shard_audit.Finding(1, shard, (device,), True, "computation")
    assert found == ([named] * 3 if lasting else [None, named, None])


def check_step(setting, wrong, random):
    """A device that erred in the step alone is named by the audit of one of its shards, and of no other device's."""
    device = setting.any_device(random)
    honest, sums = _shard_program(setting.step), _shard_program(wrong.step)
    program = OneFaultyDevice(honest, sums, setting.devices[device])
    _set_shard_program(setting.step, program)
    try:
        own = setting.own_hashes()
    finally:
        _set_shard_program(setting.step, honest)
    for shard in range(SHARDS):
        votes = setting.audit.votes(setting.state, setting.batch, shard)
        owner = setting.audit.owner(shard)
        found = shard_audit.judge_step(votes, int(own[shard]), owner, step=2, shard=shard)
        expected = shard_audit.Finding(2, shard, (device,), True, "step") if owner == device else None
        assert found == expected


def _programs(step):
    cells = dict(zip(step._program.__code__.co_freevars, step._program.__closure__, strict=True))
    return cells["sums_of_shards"].cell_contents._programs


def _shard_program(step):
    return _programs(step)._sums


def _set_shard_program(step, program):
    _programs(step)._sums = program


def check_all(num_devices, times):
    right, wrong = setting(num_devices), setting(num_devices, slightly_wrong)
    for seed in range(times):
        random = np.random.default_rng(seed)
        check_params(right, random)
        check_operator(right, wrong, random, lasting=True)
        check_operator(right, wrong, random, lasting=False)
        check_step(setting_in_stages(num_devices), setting_in_stages(num_devices, slightly_wrong), random)


@pytest.mark.parametrize("num_devices", [4, pytest.param(3, marks=pytest.mark.slow)])
def test_a_faulty_device_is_named(num_devices):
    check_all(num_devices, times=2)


@pytest.mark.soak
@pytest.mark.parametrize("num_devices", [4, 3])
def test_a_faulty_device_is_named_100_of_100_times(num_devices):
    check_all(num_devices, times=100)


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("num_devices", [4, 3])
def test_ten_thousand_clean_audits_raise_no_alarm(num_devices):
    honest = setting(num_devices)
    own = honest.own_hashes()
    for number in range(10_000):
        shard = shard_audit.chosen_shard(number, logical_shards=SHARDS, seed=0)
        votes = honest.audit.votes(honest.state, honest.batch, shard)
        assert shard_audit.judge(votes, step=number, shard=shard) is None
        assert shard_audit.judge_step(votes, int(own[shard]), 0, step=number, shard=shard) is None


@given(num_devices=st.integers(1, 9), odd=st.sets(st.integers(0, 8)), column=st.integers(0, 1))
def test_a_minority_is_named_and_without_a_majority_all_disagree(num_devices, odd, column):
    odd = tuple(sorted(place for place in odd if place < num_devices))
    votes = np.full((num_devices, 2), 7, np.uint32)
    votes[list(odd), column] = 9
    found = shard_audit.judge(votes, step=5, shard=3)
    if len(odd) in (0, num_devices):
        assert found is None
    elif 2 * len(odd) == num_devices:
        assert (found.suspects, found.named) == (tuple(range(num_devices)), False)
    else:
        rest = tuple(place for place in range(num_devices) if place not in odd)
        assert (found.suspects, found.named) == (min(odd, rest, key=len), True)
    assert found is None or found.what == ("params", "computation")[column]


def test_a_finding_is_a_sentence_that_names_the_device():
    devices = jax.devices()
    named = shard_audit.Finding(40, 3, (2,), True, "computation").tell(devices[:4])
    assert named == (
        f"{devices[2]} (process 0) computes wrongly: in the audit of step 40, it computed logical shard 3 with other "
        "bits than the others, from equal params."
    )
    two = shard_audit.Finding(40, 3, (0, 1), False, "params").tell(devices[:2])
    assert two == (
        f"{devices[0]} (process 0), {devices[1]} (process 0) disagree in the audit of step 40: their copy of the "
        "params is not that of the others. With three devices or more, the odd one would be named."
    )
    three = shard_audit.Finding(40, 3, (0, 1, 2), False, "computation").tell(devices[:3])
    assert "they computed logical shard 3 with other bits" in three
    assert three.endswith("There is no majority.")
    assert "a fault that has passed" in shard_audit.Finding(40, 3, (0,), True, "step").tell(devices[:4])


def test_a_step_that_differs_from_its_audit_names_the_owner_of_the_shard_unless_it_is_alone():
    votes = np.array([[1, 7], [1, 7]], np.uint32)
    assert shard_audit.judge_step(votes, 7, 1, step=5, shard=3) is None
    assert shard_audit.judge_step(votes, 9, 1, step=5, shard=3) == shard_audit.Finding(5, 3, (1,), True, "step")
    alone = shard_audit.judge_step(votes[:1], 9, 0, step=5, shard=3)
    assert alone == shard_audit.Finding(5, 3, (0,), False, "step")
    assert f"{jax.devices()[0]} (process 0) disagrees in the audit of step 5: the step" in alone.tell(jax.devices()[:1])


@pytest.mark.parametrize(
    ("num_devices", "layout", "owners"),
    [
        (1, layouts.replicated, [0] * 8),
        (2, layouts.replicated, [0] * 4 + [1] * 4),
        (3, layouts.replicated, [0, 0, 1, 1, 1, 2, 2, 2]),
        (3, None, [0, 1, 2, 0, 1, 2, 0, 1]),
        (8, None, list(range(8))),
    ],
)
def test_the_owner_of_a_shard(num_devices, layout, owners):
    """A large state in shards has consecutive shards computed at once."""
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    loss_fn, layout = make_loss(jnp.tanh), layout or layouts.fsdp(mesh)
    audit = shard_audit.ShardAudit(loss_fn, mesh, logical_shards=8, num_microbatches=1, layout=layout)
    audit._size = 1 << 20
    assert [audit.owner(shard) for shard in range(8)] == owners


def test_each_shard_has_its_turn_in_an_order_by_chance():
    turns = [
        [shard_audit.chosen_shard(8 * turn + place, logical_shards=8, seed=seed) for place in range(8)]
        for seed in (1, 2)
        for turn in (0, 1)
    ]
    assert [sorted(turn) for turn in turns] == [list(range(8))] * 4
    assert len(set(map(tuple, turns))) == 4
