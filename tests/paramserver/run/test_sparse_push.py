"""Row-sparse pushes: fewer bytes, the same numbers, and used where a model has an embedding."""

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import jaxdist
from jaxdist import losses
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.models import gpt
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.protocol.scheduler import lease_table
from jaxdist.paramserver.protocol.sums import dense
from jaxdist.paramserver.run import shared_plan as plans
from jaxdist.paramserver.run.island import Island
from jaxdist.paramserver.run.sparse_push import LEAST_ROWS, sparse


@given(st.integers(1, 90), st.integers(1, 5), st.sets(st.integers(0, 89)), st.integers(0, 9))
def test_what_arrives_is_what_was_computed(num_rows, row, touched, seed):
    block = np.zeros((num_rows, row), np.float32)
    for number in touched:
        if number < num_rows:
            block[number] = np.random.default_rng(seed + number).normal(size=row)
    piece = sparse(block.reshape(-1), row)
    assert np.array_equal(dense(piece, block.reshape(-1)), block.reshape(-1))
    few = 2 * sum(number < num_rows for number in touched) <= num_rows
    assert isinstance(piece, messages.Rows) or not few or row < 2 or num_rows < LEAST_ROWS or num_rows > 64


def test_a_vector_and_a_dense_matrix_go_as_they_are():
    for piece, row in ((np.zeros(1000, np.float32), 1), (np.ones(1000, np.float32), 10)):
        assert sparse(piece, row) is piece
    assert len(sparse(np.zeros(1000, np.float32), 10).ids) == 0


def test_a_worker_pushes_the_rows_of_the_tokens_it_saw():
    tokens = np.random.default_rng(0).integers(0, 20, size=(8, 4)).astype(np.int32)
    experiment = jaxdist.Experiment(
        model=gpt.GPT(vocab_size=500, context_length=4, width=8, num_layers=1, num_heads=2, tie_embeddings=False),
        loss=losses.next_token,
        inputs="tokens",
        data=jaxdist.Data(train=jaxdist.ArraySource({"tokens": tokens})),
        optimizer=jaxdist.Optimizer(name="sgd", learning_rate=0.1),
        global_batch_size=4,
        stop=jaxdist.Stop(max_steps=1),
    )
    plan = plans.make_plan(experiment, ParameterServer(workers=1, servers=2))
    island = Island(plan, jax.devices()[:1])
    params = plan.sharding.split(plans.initial_leaves(plan))
    pushed = island.gradient(effects.Compute(0, 0, lease_table.lease(plan.settings, 0), params))
    rows = [piece for shard in pushed.pieces for piece in shard if isinstance(piece, messages.Rows)]
    assert [len(piece.ids) <= 16 and piece.values.shape[1] == 8 for piece in rows] == [True]
