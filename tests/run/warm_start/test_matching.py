"""Every leaf of a file and of a model is accounted for, or the difference is named."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxdist
from jaxdist.errors import ConfigError
from jaxdist.run.warm_start.matching import match

MODEL = ("params/body/kernel", "params/head/bias", "params/head/kernel", "model_state/batch_stats/norm/mean")


def found(names, *rules, fresh=(), model=MODEL):
    settings = jaxdist.InitFrom(path="x", rules=rules, fresh=fresh)
    return match(names, {name: name for name in model}, settings, source="x")


def test_names_need_no_params_in_front():
    bare = [name.partition("/")[2] for name in MODEL]
    assert found(bare).loaded == dict(zip(MODEL, bare, strict=True))
    assert found(MODEL).loaded == dict(zip(MODEL, MODEL, strict=True))


def test_rules_rename_and_leave_out_and_the_first_decides():
    names = ["encoder/kernel", "encoder/old", "head/bias", "head/kernel", "batch_stats/norm/mean"]
    rules = (
        jaxdist.WeightRule(pattern="old$", leave_out=True),
        jaxdist.WeightRule(pattern="^enc(oder)/", to=r"body/"),
    )
    result = found(names, *rules)
    assert result.loaded["params/body/kernel"] == "encoder/kernel"
    assert (result.left, result.fresh) == (("encoder/old",), ())
    assert result.rules == {"encoder/old": rules[0], "encoder/kernel": rules[1]}


def test_what_is_fresh_is_not_loaded_and_its_value_is_left_out():
    result = found(MODEL, fresh=("^params/head/",))
    assert result.fresh == ("params/head/bias", "params/head/kernel") == result.left
    assert set(result.loaded) == set(MODEL) - set(result.fresh)


MISTAKES = {
    "a leaf without a value": ((MODEL[1:],), {}, "Missing, of the model: params/body/kernel. Loaded: 3"),
    "a leaf without a place": (([*MODEL, "opt/step"],), {}, "Without a place in the model, of x: opt/step."),
    "two for one place": (([*MODEL, "body/kernel"],), {}, "both become params/body/kernel"),
    "a rule without effect": ((MODEL, jaxdist.WeightRule(pattern="heat", leave_out=True)), {}, "no leaf matches"),
    "a rule in the shadow": (
        (MODEL, jaxdist.WeightRule(pattern="body", to="body"), jaxdist.WeightRule(pattern="body/", to="x")),
        {},
        "earlier rules match first",
    ),
    "a pattern without effect": ((MODEL,), {"fresh": ("haed",)}, "'haed' is not"),
    "nothing loaded": ((MODEL,), {"fresh": ("",)}, "Nothing would be loaded"),
    "a wrong group": ((MODEL, jaxdist.WeightRule(pattern="body", to=r"\1")), {}, "must be a replacement"),
    "names of transformers": ((["h/0/attn/c_attn/weight"],), {}, "set init_from.names to hugging-face"),
    "many": (([f"layer_{number}" for number in range(9)],), {}, "layer_5 and 3 more"),
}


@pytest.mark.parametrize(("arguments", "more", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_leaf_left_by_accident_is_an_error(arguments, more, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        found(*arguments, **more)


@given(st.sets(st.sampled_from(MODEL)), st.sets(st.sampled_from(MODEL)), st.sets(st.sampled_from(MODEL)))
def test_every_leaf_is_in_one_list_or_an_error(held, left, fresh):
    rules = [jaxdist.WeightRule(pattern=f"^{name}$", leave_out=True) for name in sorted(left & held)]
    fresh_patterns = tuple(f"^{name}$" for name in sorted(fresh))
    expected = held - left - fresh
    if expected | fresh != set(MODEL) or not expected:
        with pytest.raises(ConfigError):
            found(sorted(held), *rules, fresh=fresh_patterns)
        return
    result = found(sorted(held), *rules, fresh=fresh_patterns)
    assert set(result.loaded) == expected
    assert set(result.loaded.values()) | set(result.left) == held
    assert set(result.loaded) | set(result.fresh) == set(MODEL)
