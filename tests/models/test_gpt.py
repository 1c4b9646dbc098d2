"""GPT: no attention to later tokens, one matrix for both ends when tied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdist.models import gpt

MODEL = gpt.GPT(11, 6, num_layers=1, num_heads=2, width=8)
TOKENS = jnp.array([[3, 1, 4, 1, 5, 9]])


def test_a_token_changes_the_logits_from_its_own_position_on():
    variables = jax.jit(lambda: MODEL.init(jax.random.key(0), TOKENS, train=False))()
    logits = jax.jit(lambda tokens: MODEL.apply(variables, tokens, train=False))
    expected = logits(TOKENS)
    for position in range(6):
        changed = jnp.abs(logits(TOKENS.at[0, position].set(2)) - expected).max(axis=-1)[0] > 1e-6
        np.testing.assert_array_equal(changed, np.arange(6) >= position)


def test_untied_embeddings_add_one_matrix():
    def count(model):
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS, train=False))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert count(MODEL.clone(tie_embeddings=False)) == count(MODEL) + 11 * 8


def test_a_short_sequence_uses_the_first_positions_and_a_long_one_is_refused():
    variables = jax.jit(lambda: MODEL.init(jax.random.key(0), TOKENS, train=False))()
    logits = jax.jit(lambda tokens: MODEL.apply(variables, tokens, train=False))
    whole, short = logits(TOKENS), logits(TOKENS[:, :4])
    np.testing.assert_allclose(short, whole[:, :4], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"context_length is 6.*7 long"):
        MODEL.apply(variables, jnp.zeros((1, 7), jnp.int32), train=False)


@pytest.mark.slow
def test_packed_examples_give_the_logits_that_each_gives_alone():
    """Attention and positions: as if no other example were in the row; filling (segment 0) changes nothing either."""
    variables = jax.jit(lambda: MODEL.init(jax.random.key(0), TOKENS, train=False))()
    packed, segments = jnp.array([[3, 1, 4, 7, 5, 0]]), jnp.array([[1, 1, 1, 2, 2, 0]])
    logits = MODEL.apply(variables, packed, train=False, segment_ids=segments)
    for rows in (slice(0, 3), slice(3, 5)):
        alone = MODEL.apply(variables, packed[:, rows], train=False)
        np.testing.assert_allclose(logits[:, rows], alone, rtol=1e-4, atol=1e-5)
    assert not np.allclose(logits[:, 3:5], MODEL.apply(variables, packed, train=False)[:, 3:5], atol=1e-3)
