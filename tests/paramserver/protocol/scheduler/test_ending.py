"""The ending stage: every process hears of the end, and the scheduler leaves when all have, or after a while."""

import stages

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.protocol.scheduler.ending import LINGER


def ended():
    cast = stages.Cast(stages.settings(max_steps=1)).join()
    cast.step()
    cast.answer_cut()
    return cast


def test_it_leaves_once_every_process_acknowledged():
    cast = ended()
    cast.tell(messages.StopAck("worker/0"))
    assert not cast.state.exited
    cast.tell(messages.StopAck("server/0/a"))
    _, done = cast.tick()
    (exit_,) = stages.named(done, "Exit")
    assert (exit_.step, exit_.reason) == (1, "max_steps")


def test_it_does_not_wait_forever_for_a_process_that_is_gone():
    cast = ended()
    sent = []
    while not cast.state.exited:
        assert cast.now < 2 * LINGER * stages.TIMERS.dead_after
        sent += cast.tick(0.5)[0]
    assert cast.now > LINGER * stages.TIMERS.dead_after
    assert len(stages.named(sent, "StopRun")) > 10


def test_a_process_that_comes_late_is_told():
    sent, _ = ended().tell(messages.Register("worker/0", 9))
    assert [(to, message.reason) for to, message in sent] == [("worker/0", "max_steps")]
