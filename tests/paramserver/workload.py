"""A tiny training problem for simulated runs, whose float32 sums depend on their order, and runs drawn from a seed."""

import dataclasses
import math
import random

import checker
import numpy as np

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.protocol.settings import Settings, Timers
from jaxdist.paramserver.simulator import Faults, Hardware, Simulation

SIZES = {1: ((3, 2),), 2: ((3,), (2,)), 3: ((2,), (2,), (1,))}
TIMERS = Timers(heartbeat=0.1, retry=0.15, dead_after=0.6, stuck_after=1.5)


CLIP = 0.5


class Momentum:
    """Heavy-ball SGD in numpy: order and number of updates show in the bits. Model state becomes its mean."""

    computes_wrongly = False  # on one of the copies of a shard

    def __init__(self, clip=False, num_params=9):
        self.needs_norm, self.num_params = clip, num_params

    def init(self, params):
        return tuple(np.zeros_like(p) for p in params)

    def update(self, params, opt_state, grads, *, step, scale, norm_squared):
        if self.needs_norm:
            factor = np.float32(min(1.0, CLIP / (norm_squared**0.5 + 1e-12)))
            grads = tuple(factor * g for g in grads)
        velocity = tuple(np.float32(0.9) * v + g for v, g in zip(opt_state, grads))
        moved = tuple(p - np.float32(0.1 * scale) * v for p, v in zip(params, velocity))
        return (*moved[: self.num_params], *grads[self.num_params :]), velocity


def initial_params(servers):
    rng = np.random.default_rng(7)
    return tuple(tuple(rng.normal(size=n).astype(np.float32) for n in sizes) for sizes in SIZES[servers])


def gradient(lease, params):
    """Return the summed gradient of a lease: depends on its examples and the params, with wide-ranging magnitudes."""
    count = lease.stop - lease.start
    rng = random.Random(lease.epoch * 1_000_003 + lease.start * 1009 + lease.stop)
    finite = rng.random() < 0.97
    pieces = []
    for shard in params:
        noise = [
            np.array([rng.gauss(0, 1) * 10 ** rng.uniform(-3, 3) for _ in range(p.size)], np.float32) for p in shard
        ]
        pieces.append(tuple(np.float32(count) * (np.float32(0.2) * p + g) for p, g in zip(shard, noise)))
    counted = count if rng.random() < 0.7 else rng.randint(1, max(count, 1))  # the mask of some examples is false
    if rng.random() < 0.04:  # the loss counts none of these examples
        counted, pieces = 0, [tuple(np.zeros_like(g) for g in shard) for shard in pieces]
    if not finite:
        pieces[0] = (np.full_like(pieces[0][0], np.nan), *pieces[0][1:])
    squares = sum(float((g.astype(np.float64) ** 2).sum()) for shard in pieces for g in shard) / max(counted, 1) ** 2
    metrics = (messages.Metric("loss", 1.0 * counted, float(counted)),)
    return messages.Computed(0, 0, float(counted), float(count), finite, squares, tuple(pieces), metrics)


def rounded(computed, worker):
    """Return a gradient as the devices of `worker` round it, so that the bits of a sum show whose pushes are in it."""
    skew = np.float32(1 + worker * 2.0**-18)
    pieces = tuple(tuple(piece * skew for piece in shard) for shard in computed.pieces)
    return dataclasses.replace(computed, pieces=pieces)


class OwnBits(Simulation):
    """A run whose workers are of different kinds."""

    def computed(self, effect, worker):
        computed, seconds = super().computed(effect, worker)
        return rounded(computed, worker), seconds


def draw_settings(rng: random.Random, most_steps=10) -> Settings:
    mode = rng.choice(["sync", "sync", "bounded", "async"])
    workers = rng.randint(1, 4)
    durability = rng.choice(["none", "snapshot", "replicated", "replicated"])
    backup = rng.randint(0, workers - 1) if mode == "sync" and rng.random() < 0.4 else 0
    snapshots = durability == "snapshot" or (durability == "replicated" and rng.random() < 0.3)
    batch = rng.randint(5, 9)
    return Settings(
        num_examples=rng.randint(2, 4) * batch + rng.randint(0, batch - 1),
        global_batch_size=batch,
        max_steps=rng.randint(4, 10) if most_steps == 10 else rng.randint(20, most_steps),
        workers=workers,
        servers=rng.randint(1, 3),
        mode=mode,
        max_staleness=rng.randint(0, 3) if mode == "bounded" else 0,
        backup_workers=backup,
        durability=durability,
        snapshot_every=rng.randint(1, 4) if snapshots else 0,
        read_every=rng.choice([(), (), (2,), (3, 5)]),
        check_copies_every=rng.randint(0, 3),
        timers=TIMERS,
    )


def draw_faults(rng: random.Random, longest=3.0) -> Faults:
    def sometimes(high):
        return rng.uniform(0, high) if rng.random() < 0.6 else 0.0

    def seldom(high):
        return rng.uniform(0, high) if rng.random() < 0.3 else 0.0

    return Faults(
        until=rng.uniform(1.0, longest),
        drop=sometimes(0.15),
        repeat=sometimes(0.3),
        slow=sometimes(0.3),
        late=seldom(0.1),
        breaks=sometimes(5.0),
        partitions=sometimes(1.5),
        kills=sometimes(2.5 * 3.0 / longest),
        crash=seldom(0.003 * 3.0 / longest),
        lost_disk=seldom(0.3),
        pauses=sometimes(1.5),
        crash_at_append=sometimes(0.1),
        disk_full=sometimes(0.3),
        disk_slow=seldom(0.1),
        slow_worker=rng.choice([1.0, 1.0, 5.0]),
        busy=sometimes(0.03),
        jumps=sometimes(1.0),
        vanish=seldom(1.0),
    )


def draw_changes(rng: random.Random, faults: Faults) -> Faults:
    """Draw how many workers join and leave: those of a long run are spread over it."""
    joins, leaves = (rng.uniform(0.0, 6.0 / faults.until) if rng.random() < 0.3 else 0.0 for _ in range(2))
    return dataclasses.replace(faults, joins=joins, leaves=leaves)


def draw_hardware(rng: random.Random) -> Hardware:
    """Draw machines: half of the runs know no bandwidth; in the others, messages of an array are large ones."""
    if rng.random() < 0.5:
        return Hardware()
    return Hardware(
        bandwidth=10 ** rng.uniform(3.5, 6.0),
        handle_seconds=(rng.uniform(0.0, 0.002), rng.uniform(0.0, 1e-4)),
        fsync_seconds=(0.0005, rng.uniform(0.001, 0.02)),
        small_bytes=rng.choice([140, 64 << 10]),
        window=rng.choice([200, 2000, 1 << 20]),
        queue_bytes=rng.choice([1000, 5000, 1 << 20]),
        budget=rng.choice([300, 1000, 1 << 20]),
    )


def draw_end(rng: random.Random, settings: Settings, faults: Faults) -> tuple[float, float]:
    """Draw when a run is told to end and the step at which its target is reached; most have neither."""
    told, reached = rng.uniform(0.0, 2.0 * faults.until), rng.randint(1, settings.max_steps)
    return rng.choice([(math.inf, math.inf)] * 6 + [(told, math.inf), (math.inf, reached)])


LONG_SHARE = 0.05
"""Share of the runs that have up to 300 steps."""


@dataclasses.dataclass
class Drawn:
    """What a seed stands for."""

    settings: Settings
    faults: Faults
    hardware: Hardware
    clip: bool
    num_params: int
    own_bits: bool = False
    halt_at: float = math.inf
    target_step: float = math.inf

    @classmethod
    def of(cls, seed):
        rng = random.Random(seed)
        long = rng.random() < LONG_SHARE
        settings = draw_settings(rng, 300 if long else 10)
        faults = draw_faults(rng, 30.0 if long else 3.0)
        hardware, clip, num_params = draw_hardware(rng), rng.random() < 0.3, rng.choice([9, 9, 1])
        faults = draw_changes(rng, faults)
        own_bits, ends = rng.random() < 0.3, draw_end(rng, settings, faults)
        settings = dataclasses.replace(settings, stop_on_nonfinite=rng.random() < 0.3)
        return cls(settings, faults, hardware, clip, num_params, own_bits, *ends)


def simulate(seed, *, updater=Momentum, roles=None, **instead):
    """Play the run a seed stands for, with what is given instead of drawn."""
    drawn = dataclasses.replace(Drawn.of(seed), **instead)
    simulation = (OwnBits if drawn.own_bits else Simulation)(
        seed=seed,
        settings=drawn.settings,
        faults=drawn.faults,
        hardware=drawn.hardware,
        params=initial_params(drawn.settings.servers),
        gradient=gradient,
        make_updater=lambda: updater(drawn.clip, drawn.num_params),
        roles=roles,
        halt_at=drawn.halt_at,
        target_step=drawn.target_step,
    )
    simulation.clip = CLIP if drawn.clip else None
    simulation.num_params = drawn.num_params
    simulation.computes_wrongly = updater.computes_wrongly
    simulation.rounded = rounded if drawn.own_bits else lambda computed, worker: computed
    return simulation.run(patience=60.0 + 3.0 * drawn.settings.max_steps)


def play(seed, **instead):
    """Simulate and judge; an error names the seed that replays it."""
    try:
        simulation = simulate(seed, **instead)
        checker.check(simulation)
    except Exception as error:
        error.add_note(f"seed {seed}: workload.play({seed}) in tests/paramserver replays it")
        raise
    return simulation
