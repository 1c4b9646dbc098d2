import os

import pytest
import tiny_experiment

import jaxdist
from jaxdist.checkpoint import checkpoints, step_names
from jaxdist.errors import UserError


@pytest.mark.parametrize(
    ("name", "found"), [("40", (40, 0)), ("40.1", (40, 1)), ("0", (0, 0)), ("040", None), ("40.0", None), ("4x", None)]
)
def test_a_name_is_a_step_and_how_often_it_was_saved_before(name, found):
    assert step_names.parse(name) == found


def test_the_last_of_several_directories_of_a_step_is_valid(tmp_path):
    for name in ("8", "8.10", "8.2", "4", "removed-4", "lost+found"):
        (tmp_path / name).mkdir()
    found = step_names.committed(tmp_path)
    assert {step: [path.name for path in paths] for step, paths in found.items()} == {4: ["4"], 8: ["8", "8.2", "8.10"]}
    assert step_names.committed(tmp_path / "none") == {}


def test_a_directory_whose_name_is_no_text_is_refused_before_anything_is_written(tmp_path):
    step_names.check_spelling(tmp_path / "läuft 走")
    odd = tmp_path / os.fsdecode(b"l\xffuft")
    with pytest.raises(ValueError, match=r"text in UTF-8; .*udcffuft. is not"):
        step_names.check_spelling(odd)
    with pytest.raises(UserError, match="text in UTF-8"):
        jaxdist.train(tiny_experiment.get_config(), run_dir=odd)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="text in UTF-8"):
        checkpoints.Checkpointer(odd, identity="tiny")
