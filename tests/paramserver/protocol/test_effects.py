"""What a state machine hands to its driver: replies and effects, each in the order they were added."""

from jaxdist.paramserver.protocol import effects, messages


def test_replies_and_effects_keep_their_order_and_no_process_gets_nothing():
    out = effects.Output()
    out.send("worker/0", messages.DoneAck(0, 1, 2))
    out.do(effects.Warn("first"))
    out.send("", messages.NoOp())  # a shard without a backup
    out.do(effects.Warn("second"))
    out.send("worker/1", messages.NoOp())
    assert out.replies == [("worker/0", messages.DoneAck(0, 1, 2)), ("worker/1", messages.NoOp())]
    assert out.effects == [effects.Warn("first"), effects.Warn("second")]
