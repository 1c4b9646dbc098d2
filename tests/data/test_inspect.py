import numpy as np

from jaxdist.data import ArraySource, Loader
from jaxdist.data.inspect import inspect, render


def test_inspect_shows_fields_pictures_text_and_where_time_goes():
    images = np.zeros((20, 4, 3, 1), np.uint8)
    images[:, 1, 2] = 255
    source = ArraySource(
        {"image": images, "label": np.full(20, 7), "text": np.frombuffer(b"hello" * 20, np.uint8).reshape(20, 5)}
    )
    for example_fn in (None, lambda example, random: {**example, "noise": random.random(12)}):
        found = inspect(Loader(source, global_batch_size=8, seed=0, example_fn=example_fn))
        assert set(found.microseconds) == {"source", "transform", "assembly", "wait"}
        assert (found.microseconds["transform"] > 0) == (example_fn is not None)
        assert found.microseconds["source"] > 0
        assert found.fields["image"] == ((4, 3, 1), "uint8", 0.0, 255.0)
        text = render(found)
        assert "\n        \n      @@\n        \n" in text.replace("  \n", "  \n")
        assert "'hello'" in text
        assert "label 7" in text
        assert "20 examples" in text
        assert "throughput" in text
        assert ("noise: [" in text) == (example_fn is not None)


def test_inspect_of_one_batch():
    source = ArraySource({"x": np.zeros((3, 2))})
    found = inspect(Loader(source, global_batch_size=4, seed=0, shuffle=False, num_epochs=1))
    assert found.examples_per_second > 0
    assert len(found.examples) == 3


def test_inspect_shows_the_names_of_numbers():
    source = ArraySource({"label": np.arange(30)})
    source.vocabulary = {"label": tuple(f"class {number}" for number in range(30))}
    found = inspect(Loader(source, global_batch_size=8, seed=0))
    assert found.vocabulary == source.vocabulary
    assert "names of label: 0 class 0, 1 class 1, " in render(found)
    assert "19 class 19 ..." in render(found)
