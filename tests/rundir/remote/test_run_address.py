import pathlib

import pytest

from jaxdist.errors import UserError
from jaxdist.rundir.remote.run_address import Address, place_of_run


def test_what_has_a_protocol_is_an_address_and_what_has_none_a_path():
    assert place_of_run("runs/a") == pathlib.Path("runs/a")
    assert place_of_run("s3://bucket/runs/a/") == Address("s3://bucket/runs/a")
    assert (place_of_run("GS://b/a").protocol, place_of_run("gs://b/a").name) == ("gs", "a")


def test_two_addresses_have_two_folders_even_if_their_runs_have_one_name():
    names = {place_of_run(f"s3://{bucket}/a").folder_name for bucket in ("one", "two")}
    assert len(names) == 2
    assert all(name.startswith("a-") for name in names)


@pytest.mark.parametrize("text", ["://x", "s3://", "3s://x", "ftp://user:secret@host/x"])
def test_what_is_no_address_or_holds_a_password_is_refused(text):
    with pytest.raises(UserError) as refused:
        Address(text).check()
    assert "secret" not in str(refused.value)
