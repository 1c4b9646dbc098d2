"""Certificates that others would not accept are refused before a run begins."""

import pathlib
import ssl

import pytest

from jaxdist.paramserver.wire import certificates
from jaxdist.paramserver.wire.security import CERTIFICATE, KEY, ROOT, Security

FOLDER = pathlib.Path(__file__).parents[1] / "certificates"
FILES = {CERTIFICATE: "node.pem", KEY: "key.pem", ROOT: "root.pem"}


def secured(**files):
    return Security.read({name: str(FOLDER / file) for name, file in {**FILES, **files}.items()})


def test_certificates_that_fit_are_accepted_and_none_are_needed():
    certificates.check(secured(), "127.0.0.1")
    certificates.check(Security(token="secret"), "10.0.0.1")


def test_certificates_that_expire_soon_are_told_with_the_time(monkeypatch, capsys):
    expires = certificates.check(secured(), "127.0.0.1")
    assert expires == ssl.cert_time_to_seconds("Nov  1 15:19:21 2126 GMT")  # the root; the other one a second later
    certificates.say_if_soon(expires)
    certificates.say_if_soon(certificates.check(Security(token="secret"), "10.0.0.1"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(certificates.time, "time", lambda: expires - 24 * 3600)
    certificates.say_if_soon(expires)
    assert "signed it, expires on 01 November 2126, 15:19 UTC" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "host"),
    [
        ({}, "10.9.8.7"),  # of another machine
        ({ROOT: "node.pem"}, "127.0.0.1"),  # it did not sign the certificate
        ({CERTIFICATE: "root.pem"}, "127.0.0.1"),  # the key is of another one
        ({KEY: "README.md"}, "127.0.0.1"),
        ({KEY: "encrypted.pem"}, "127.0.0.1"),  # no process may wait for a pass phrase
        ({ROOT: "README.md"}, "127.0.0.1"),
    ],
)
def test_certificates_that_do_not_fit_are_refused_with_the_variables_that_name_them(files, host):
    with pytest.raises(ValueError, match=f"(?s){CERTIFICATE}.*{KEY}.*{ROOT}.*{host}.*openssl verify"):
        certificates.check(secured(**files), host)


def test_a_file_that_is_missing_is_named():
    with pytest.raises(ValueError, match=rf"{KEY} names a file that cannot be read: .*none\.pem"):
        secured(**{KEY: "none.pem"})
