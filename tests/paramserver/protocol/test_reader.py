"""The reader of cuts: parts of one term and number, asked for again until they are there, and one verdict."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.protocol.reader import Reader

PRIMARIES = ("server/0/a", "server/1/b")
PARAMS, WHOLE = (messages.PARAMS,), (messages.PARAMS, messages.OPT_STATE)


def offer(term=3, number=1, step=5):
    return messages.Offer(term, number, step, "", messages.Trained(step, ()), PRIMARIES)


def answer_of(read, *, chain=7, value=0.0):
    return messages.ReadAnswer(read.term, read.shard, read.number, read.part, 5, chain, (np.full(2, value),))


@pytest.fixture
def reader():
    made = Reader(1.0)
    assert made.handle(offer(), 0.0)[1] == [effects.Offered(offer())]
    return made


def reads(reader, message, now=0.0):
    return [(to, sent) for to, sent in reader.handle(message, now)[0] if isinstance(sent, messages.Read)]


def test_each_part_is_asked_of_the_primary_of_its_shard(reader):
    asked = reads(reader, messages.Want(WHOLE))
    assert [(to, read.shard, read.part) for to, read in asked] == [
        ("server/0/a", 0, "params"),
        ("server/1/b", 1, "params"),
        ("server/0/a", 0, "opt_state"),
        ("server/1/b", 1, "opt_state"),
    ]


def test_what_is_missing_is_asked_for_again_after_a_while(reader):
    first, second = reads(reader, messages.Want(PARAMS))
    reader.handle(answer_of(first[1]), 0.1)
    assert not reads(reader, messages.Tick(), 0.5)
    assert reads(reader, messages.Tick(), 1.0) == [second]
    reader.handle(answer_of(second[1]), 1.1)
    assert not reads(reader, messages.Tick(), 5.0)


def test_the_rest_is_read_later_and_shown_with_what_was_read(reader):
    shown = []
    for parts in (PARAMS, WHOLE):
        asked = reads(reader, messages.Want(parts))
        assert len(asked) == 2
        for _, read in asked:
            shown += reader.handle(answer_of(read), 0.0)[1]
    assert [bool(cut.opt_state) for cut in shown] == [False, True]
    assert all(len(cut.params) == 2 and cut.chains == (7, 7) for cut in shown)


def test_a_verdict_is_sent_and_given_again_where_the_cut_is_offered_again(reader):
    verdict = messages.Verdict(3, 1, "")
    assert reader.handle(verdict, 0.0) == ([("scheduler", verdict)], [])
    assert reader.handle(offer(), 1.0) == ([("scheduler", verdict)], [])
    assert not reads(reader, messages.Tick(), 9.0)


def test_an_answer_after_the_verdict_is_of_no_cut(reader):
    """A late copy of a request is answered with a later step."""
    for _, read in reads(reader, messages.Want(PARAMS)):
        reader.handle(answer_of(read), 0.0)
    reader.handle(messages.Verdict(3, 1, ""), 0.0)
    (_, read), _ = reads(reader, messages.Want(PARAMS))
    assert not reader.handle(answer_of(read, chain=8), 0.0)[1]
    assert not reader._answers  # nor are the arrays of the cut kept until the next one


@given(st.data())
def test_a_cut_has_only_parts_of_its_own_term_and_number(data):
    """Whatever arrives late, twice or out of order."""
    reader, asked, newest, shown = Reader(1.0), [], (0, 0), []
    for now in itertools.count():
        if now == 30:
            break
        kind = data.draw(st.sampled_from(["offer", "want", "answer", "tick"]))
        if kind == "offer":
            message = offer(*data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3))))
            newest = max(newest, (message.term, message.number))
        elif kind == "want" and newest != (0, 0):
            message = messages.Want(data.draw(st.sampled_from([PARAMS, WHOLE])))
        elif kind == "answer" and asked:
            read = data.draw(st.sampled_from(asked))
            message = answer_of(read, chain=10 * read.term + read.number, value=10 * read.term + read.number)
        else:
            message = messages.Tick()
        replies, todo = reader.handle(message, float(now))
        assert all(isinstance(sent, messages.Read) for _, sent in replies), "there is no verdict to repeat"
        asked += [sent for _, sent in replies]
        shown += [(newest, effect) for effect in todo if isinstance(effect, effects.CutRead)]
    for (term, number), cut in shown:
        assert (cut.offer.term, cut.offer.number) == (term, number)
        assert set(cut.chains) == {10 * term + number}
        assert {float(a[0]) for part in (cut.params, cut.opt_state) for (a,) in part} == {10 * term + number}
