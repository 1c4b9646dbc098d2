"""The token of an attempt: processes left over from another attempt do not have it."""

import pytest

from jaxdist.paramserver.wire.security import UNSECURED, Security


def test_two_attempts_at_a_run_have_different_tokens():
    given = Security(token="secret")
    first, second = given.for_attempt("a"), given.for_attempt("b")
    assert len({given.token, first.token, second.token}) == 3
    assert given.for_attempt("a") == first
    assert Security(token="other").for_attempt("a") != first


def test_certificates_alone_get_a_token_of_the_attempt_too():
    given = Security(certificate=b"c", key=b"k", root=b"r")
    assert given.for_attempt("a").token
    assert given.for_attempt("a").certificate == b"c"


def test_without_a_secret_an_address_beyond_loopback_stays_refused():
    assert UNSECURED.for_attempt("a") == UNSECURED
    with pytest.raises(ValueError, match=r"got 10\.0\.0\.1 without any"):
        UNSECURED.for_attempt("a").check("10.0.0.1")
