"""The fit, against programs whose times are made by known rates."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.plan.calibrated import operation_rates as rates
from jaxdist.plan.compiled.operations import ELEMENTWISE, MATMUL, Operation

START, BYTE, FLOP = 2e-6, 1e-10, 1e-11


def program(seed, count=40, noise=0.0):
    """Operations that take START + bytes x BYTE + FLOPs x FLOP, and a step that takes 1 ms more than their sum."""
    random = np.random.default_rng(seed)
    done = [
        Operation("", ELEMENTWISE, num_bytes=int(random.integers(1000, 900_000)), times=int(random.integers(1, 4)))
        for _ in range(count)
    ] + [Operation("", MATMUL, flops=float(random.integers(10**5, 10**9)), num_bytes=8) for _ in range(count)]
    exact = np.array([START + each.num_bytes * BYTE + each.flops * FLOP for each in done])
    seconds = exact * np.exp(noise * random.standard_normal(len(done)))
    step = 1e-3 + float(sum(each.times * taken for each, taken in zip(done, exact, strict=True)))
    return rates.MeasuredProgram(f"program {seed}", done, seconds.tolist(), step)


def total(found, done):
    return sum(found.operation_seconds(done, 0).values())


def test_known_rates_are_found_and_predict_what_was_not_measured():
    found = rates.fit([program(seed, count=10 * seed) for seed in range(1, 7)])
    new = program(99)
    assert found.of(new) == pytest.approx(new.step_seconds, rel=0.03)
    assert found.start_seconds == pytest.approx(1e-3, rel=0.2)
    assert found.error < 0.03


def test_noise_of_single_operations_averages_out():
    found = rates.fit([program(seed, count=10 * seed, noise=0.5) for seed in range(1, 7)])
    new = program(99)
    assert found.of(new) == pytest.approx(new.step_seconds, rel=0.15)


@settings(max_examples=10)
@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-6, 1e-2)), min_size=1, max_size=30))
def test_predictions_add_up_to_what_was_measured_and_none_is_negative(rows):
    done = [Operation("", ELEMENTWISE, num_bytes=size) for size, _ in rows]
    made = rates.MeasuredProgram("any", done, [seconds for _, seconds in rows], 1.0)
    found = rates.fit([made])
    assert total(found, done) == pytest.approx(sum(made.seconds), rel=1e-3)
    assert min(min(each) for each in found.kinds.values()) >= 0


def test_a_kind_that_was_not_measured_has_the_rates_of_all():
    found = rates.fit([program(1)])
    other = Operation("", "collective", num_bytes=500_000)
    assert total(found, [other]) > 0


def test_threads_batches_and_fusions_have_rates_of_their_own():
    one = Operation("", MATMUL, flops=1e6)
    changed = [
        one,
        *(dataclasses.replace(one, **change) for change in ({"split": True}, {"library": True}, {"products": 2})),
    ]
    made = rates.MeasuredProgram("any", changed, [1e-3, 2e-3, 3e-3, 4e-3], 1.0)
    found = rates.fit([made])
    assert [total(found, [each]) for each in changed] == pytest.approx(made.seconds, rel=1e-3)


def test_memory_that_comes_anew_in_each_step_has_a_rate_of_its_own():
    steady = [program(seed, count=10 * seed) for seed in range(1, 7)]
    size = 2 * rates.FRESH_BYTES
    slowed = dataclasses.replace(program(7), temp_bytes=size, step_seconds=program(7).step_seconds + size * 3e-10)
    # What its operations waited for is not taken for their own rates.
    slowed = dataclasses.replace(slowed, seconds=[9 * each for each in slowed.seconds])
    found, new = rates.fit([*steady, slowed]), program(99)
    assert found.fresh_seconds == pytest.approx(3e-10, rel=0.1)
    almost, enough = (dataclasses.replace(new, temp_bytes=rates.FRESH_BYTES + more) for more in (-1, 0))
    assert found.of(almost) == pytest.approx(new.step_seconds, rel=0.03)
    expected = new.step_seconds + rates.FRESH_BYTES * found.fresh_seconds
    assert found.of(enough) == pytest.approx(expected, rel=0.03)


def test_what_does_not_fit_in_a_cache_has_a_rate_of_its_own():
    held = [rates.CACHE_BYTES * part // 4 for part in range(1, 7)]
    far = 3e-10

    def slowed(seed, size):
        made = program(seed, count=10 * seed)
        share = min(size / rates.CACHE_BYTES, 1)
        more = [each.num_bytes * far * share for each in made.operations]
        seconds = [taken + extra for taken, extra in zip(made.seconds, more, strict=True)]
        step = made.step_seconds + sum(each.times * extra for each, extra in zip(made.operations, more, strict=True))
        return dataclasses.replace(made, seconds=seconds, step_seconds=step, held_bytes=size)

    found = rates.fit([slowed(seed, size) for seed, size in enumerate(held, start=1)])
    for size in (0, rates.CACHE_BYTES // 3, 9 * rates.CACHE_BYTES):
        assert found.of(slowed(99, size)) == pytest.approx(slowed(99, size).step_seconds, rel=0.05)
