"""Both ends of a connection prove that they know the token, and neither sends it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.paramserver.wire import greeting


def greet(listener, caller, lane=1):
    challenged = greeting.challenge()
    answered, expected = greeting.answer(caller, challenged, lane)
    welcome, found = greeting.check(listener, challenged, answered)
    greeting.compare(welcome, expected)
    assert [len(challenged), len(answered), len(welcome)] == [
        greeting.CHALLENGE_BYTES,
        greeting.ANSWER_BYTES,
        greeting.WELCOME_BYTES,
    ]
    return found, challenged + answered + welcome


@given(st.text(), st.integers(0, 1))
def test_two_ends_with_the_same_token_agree_on_the_lane(token, lane):
    assert greet(token, token, lane)[0] == lane


def test_the_token_is_not_sent_and_no_greeting_is_like_another():
    first, second = (greet("a secret", "a secret")[1] for _ in range(2))
    assert b"a secret" not in first
    assert first != second


TOKENS = st.text(st.characters(min_codepoint=1, codec="utf-8"))  # HMAC pads keys with zeros


@given(TOKENS, TOKENS)
def test_another_token_is_refused_by_both(ours, theirs):
    if ours == theirs:
        return
    with pytest.raises(greeting.Refused, match="token"):
        greet(ours, theirs)
    challenged = greeting.challenge()
    answered, expected = greeting.answer(ours, challenged, 0)
    with pytest.raises(greeting.Refused, match="listener"):
        greeting.compare(greeting.check(theirs, challenged, greeting.answer(theirs, challenged, 0)[0])[0], expected)
    assert answered[: greeting.CHALLENGE_BYTES] != challenged


@given(st.integers(0, greeting.ANSWER_BYTES - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_whatever_it_says(position, change):
    """The lane is covered, too: a proof of one connection is worth nothing for another."""
    challenged = greeting.challenge()
    answered = bytearray(greeting.answer("token", challenged, 0)[0])
    answered[position] ^= change
    with pytest.raises(greeting.Refused):
        greeting.check("token", challenged, bytes(answered))
    with pytest.raises(greeting.Refused):
        greeting.check("token", greeting.challenge(), greeting.answer("token", challenged, 0)[0])


def test_what_greets_otherwise_is_refused():
    with pytest.raises(greeting.Refused, match="another version"):
        greeting.answer("token", b"HTTP/1.1" + bytes(16), 0)
