import dataclasses

import pytest

from jaxdist.config.parameter_server import ParameterServer
from jaxdist.errors import ConfigError
from jaxdist.paramserver.protocol.settings import Settings


def test_hosts_need_the_engine_that_takes_them():
    assert ParameterServer(hosts=("a", "b")).hosts == ("a", "b")
    with pytest.raises(ValueError, match=r"ps\.hosts needs ps\.engine=processes"):
        ParameterServer(hosts=("a",), engine="ray")


def test_a_mode_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="one of sync, bounded, async; got 'lazy'"):
        ParameterServer(mode="lazy")


def test_the_protocol_gets_every_setting():
    chosen = ParameterServer(workers=3, servers=2, mode="bounded", max_staleness=4, dead_after_seconds=2.0)
    settings = Settings.of(chosen, num_examples=9, global_batch_size=6, max_steps=5, read_every=(2,))
    for field in dataclasses.fields(ParameterServer):
        assert getattr(settings, field.name) == getattr(chosen, field.name)
    assert (settings.timers.dead_after, settings.timers.heartbeat, settings.read_every) == (2.0, 0.2, (2,))
