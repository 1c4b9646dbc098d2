"""The observer's half of the cuts stage, as a state machine without I/O: it reads from the servers what it needs.

The scheduler offers a cut. Until the verdict, no shard changes in that term, so the parts of the shards may be read one
after the other: the params for an evaluation, and the optimizer's state, often twice as large, for a checkpoint alone.
"""

from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.protocol.settings import SCHEDULER

_NO_OFFER = messages.Offer(-1, -1, 0, "", messages.Trained(0, ()), ())


class Reader:
    """Reads the cut that is offered. `handle` is the whole interface; the observer tells it Want and Verdict.

    Args:
      retry: seconds after which parts that have not arrived are asked for again.
    """

    def __init__(self, retry: float) -> None:
        self._retry, self._asked_at = retry, 0.0
        self._offer = _NO_OFFER
        self._parts: tuple[str, ...] = ()
        self._answers: dict[tuple[str, int], messages.ReadAnswer] = {}
        self._verdict: messages.Verdict | None = None

    def handle(self, message: messages.Message, now: float) -> tuple[list[effects.Send], list[effects.Effect]]:
        """Handle one message; return what to send after the effects are done."""
        out = effects.Output()
        match message:
            case messages.Offer():
                self._take(message, out)
            case messages.Want(parts):
                self._parts = parts
                self._ask(now, out)
            case messages.ReadAnswer():
                self._keep(message, out)
            case messages.Verdict():
                self._verdict, self._parts, self._answers = message, (), {}
                out.send(SCHEDULER, message)
            case messages.Tick() if now - self._asked_at >= self._retry:
                self._ask(now, out)
        return out.replies, out.effects

    def _take(self, offer: messages.Offer, out: effects.Output) -> None:
        if (offer.term, offer.number) > (self._offer.term, self._offer.number):
            self._offer, self._parts, self._answers, self._verdict = offer, (), {}, None
            out.do(effects.Offered(offer))
        elif self._verdict is not None:
            out.send(SCHEDULER, self._verdict)

    def _ask(self, now: float, out: effects.Output) -> None:
        """Ask for the parts that are missing."""
        self._asked_at, offer = now, self._offer
        for part in self._parts:
            for shard, primary in enumerate(offer.primaries):
                if (part, shard) not in self._answers:
                    out.send(primary, messages.Read(offer.term, shard, offer.number, part))

    def _keep(self, answer: messages.ReadAnswer, out: effects.Output) -> None:
        """Keep a part; show the cut once it was the last one that is wanted."""
        offer = self._offer
        if (answer.term, answer.number) != (offer.term, offer.number):
            return
        if self._verdict is not None:
            return  # to a late copy of a request: shards change again after the verdict
        self._answers[answer.part, answer.shard] = answer
        shards = range(len(offer.primaries))
        if self._parts and all((part, shard) in self._answers for part in self._parts for shard in shards):
            found = {part: tuple(self._answers[part, shard] for shard in shards) for part in self._parts}
            arrays = {part: tuple(each.arrays for each in answers) for part, answers in found.items()}
            chains = tuple(each.chain for each in found[messages.PARAMS])
            self._parts = ()
            out.do(effects.CutRead(offer, chains, arrays[messages.PARAMS], arrays.get(messages.OPT_STATE, ())))
