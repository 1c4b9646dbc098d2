from jaxdist.rundir import confusion

METRICS = {
    "eval/loss": 0.5,
    "eval/confusion_0_0": 3.0,
    "eval/confusion_1_0": 12.0,
    "eval/night/confusion_0_1": 1.0,
    "confusion_of_mine": 2.0,
}


def test_the_counts_of_a_matrix_are_told_from_other_metrics():
    assert confusion.without_entries(METRICS) == {"eval/loss": 0.5, "confusion_of_mine": 2.0}


def test_the_matrix_of_each_set_is_put_together():
    assert confusion.matrices(METRICS) == {"eval": [[3.0, 0.0], [12.0, 0.0]], "eval/night": [[0.0, 1.0], [0.0, 0.0]]}


def test_a_matrix_is_shown_as_a_table():
    assert confusion.format_tables({"loss": 1.0}) == ""
    title, *rows = confusion.format_tables({"confusion_0_0": 3.0, "confusion_1_0": 12.0}).splitlines()
    assert title.startswith("confusion (a row for each label")
    assert rows == ["     0   1", " 0   3   0", " 1  12   0"]
