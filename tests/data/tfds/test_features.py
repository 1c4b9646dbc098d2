"""Features of every kind, beside what tfds itself encodes: features.json is read, and no TensorFlow."""

import dataclasses
import io
import json
import sys

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from jaxdist.data import CorruptExample
from jaxdist.data.tfds.features import Feature, UnknownFeature, decode_features, read_features

F = tfds.features


def decoded(tmp_path, features, example, fields=None):
    """Save the features, encode the example by tfds, and return what is decoded of it."""
    features = F.FeaturesDict(features)
    features.save_config(str(tmp_path))
    found = read_features(tmp_path)
    return decode_features(
        [f for f in found if fields is None or f.name in fields], features.serialize_example(example)
    )


def check(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        value = np.asarray(value)
        assert (np.asarray(found[name]).dtype, np.shape(found[name])) == (value.dtype, value.shape), name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


SCALARS = {
    **{name: np.dtype(name).type(-100) for name in ("int8", "int16", "int32", "int64")},
    **{name: np.dtype(name).type(200) for name in ("uint8", "uint16", "uint32")},
    "uint64": np.uint64(2**64 - 7),
    "bool": np.bool_(True),
    **{name: np.dtype(name).type(-0.5) for name in ("float16", "float32", "float64")},
}


def test_numbers_of_every_dtype_keep_it_alone_in_arrays_and_in_sequences(tmp_path):
    features, example = {}, {}
    for name, value in SCALARS.items():
        dtype = value.dtype
        features |= {name: F.Scalar(dtype), f"{name}/array": F.Tensor(shape=(2, None), dtype=dtype)}
        features |= {
            f"{name}/list": F.Sequence(F.Scalar(dtype)),
            f"{name}/none": F.Sequence(F.Tensor(shape=(3,), dtype=dtype)),
        }
        example |= {name: value, f"{name}/array": np.full((2, 3), value), f"{name}/list": np.full(4, value)}
        example |= {f"{name}/none": np.zeros((0, 3), dtype)}
    check(decoded(tmp_path, features, example), example)


def test_encoded_numbers_and_shapes_that_differ(tmp_path):
    random = np.random.default_rng(0)
    features = {
        "zlib": F.Tensor(shape=(None, 3), dtype=np.float32, encoding="zlib"),
        "bytes": F.Tensor(shape=(2,), dtype=np.uint64, encoding="bytes"),
        "free": F.Tensor(shape=(None, None, 1), dtype=np.int16, encoding="zlib"),
        "box": F.BBoxFeature(),
        "nested": {"inner": {"value": np.int32}},
    }
    example = {
        "zlib": random.random((5, 3), np.float32),
        "bytes": np.array([1, 2**63 + 1], np.uint64),
        "free": random.integers(0, 9, (4, 2, 1)).astype(np.int16),
        "box": np.array([0.1, 0.2, 0.3, 0.4], np.float32),
        "nested": {"inner": {"value": np.int32(7)}},
    }
    nested = example["nested"]["inner"]["value"]
    found = decoded(tmp_path, features, example)
    check(found, {**{k: v for k, v in example.items() if k != "nested"}, "nested/inner/value": nested})


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_images_and_sequences_of_them_are_those_of_tfds(tmp_path, kind):
    random = np.random.default_rng(0)
    grey = np.kron(random.integers(0, 255, (2, 5, 5, 1)), np.ones((1, 6, 6, 1))).astype(np.uint8)
    colour = np.kron(random.integers(0, 255, (1, 4, 5, 3)), np.ones((1, 6, 6, 1))).astype(np.uint8)[0]

    def encoded(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
            file, kind, **({"quality": 95} if kind == "jpeg" else {})
        )
        return file.getvalue()

    features = F.FeaturesDict(
        {
            "grey": F.Image(shape=(30, 30, 1), encoding_format=kind),
            "colour": F.Image(encoding_format=kind),
            "frames": F.Sequence(F.Image(shape=(30, 30, 1), encoding_format=kind)),
            "none": F.Sequence(F.Image(shape=(30, 30, 1), encoding_format=kind)),
        }
    )
    features.save_config(str(tmp_path))
    lists = {
        "grey": [encoded(grey[0])],
        "colour": [encoded(colour)],
        "frames": [encoded(each) for each in grey],
        "none": [],
    }
    record = tf_example_pb2.Example(
        features=tf_feature_pb2.Features(
            feature={n: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=v)) for n, v in lists.items()}
        )
    ).SerializeToString()
    found = decode_features(read_features(tmp_path), record)
    expected = {
        "grey": features["grey"].decode_example_np(lists["grey"][0]),
        "colour": features["colour"].decode_example_np(lists["colour"][0]),
        "frames": np.stack([features["grey"].decode_example_np(each) for each in lists["frames"]]),
        "none": np.zeros((0, 30, 30, 1), np.uint8),
    }
    check(found, expected)


def test_a_float_image_is_four_bytes_a_number_and_a_deep_one_keeps_its_bits(tmp_path):
    depth = np.arange(12, dtype=np.float32).reshape(3, 4, 1) / 7
    deep = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    files = {}
    for name, picture in (("depth", Image.fromarray(depth.view(np.uint8))), ("deep", Image.fromarray(deep))):
        file = io.BytesIO()
        picture.save(file, "png")
        files[name] = file.getvalue()
    F.FeaturesDict(
        {"depth": F.Image(shape=(3, 4, 1), dtype=np.float32), "deep": F.Image(shape=(3, 4, 1), dtype=np.uint16)}
    ).save_config(str(tmp_path))
    record = tf_example_pb2.Example()
    for name, data in files.items():
        record.features.feature[name].bytes_list.value.append(data)
    check(
        decode_features(read_features(tmp_path), record.SerializeToString()), {"depth": depth, "deep": deep[..., None]}
    )


def declare(tmp_path, **features):
    """Write a features.json of features that tfds builds only with TensorFlow."""
    declared = {
        name: {"pythonClassName": f"tensorflow_datasets.core.features.x.{kind.capitalize()}", kind: settings}
        for name, (kind, settings) in features.items()
    }
    (tmp_path / "features.json").write_text(json.dumps({"featuresDict": {"features": declared}}))
    return read_features(tmp_path)


def test_sounds_and_videos_are_read_without_tensorflow(tmp_path):
    samples = (np.sin(np.arange(800) / 9) * 20_000).astype(np.int16)
    sound, frames = io.BytesIO(), []
    soundfile.write(sound, samples, 8000, format="FLAC", subtype="PCM_16")
    for shade in (10, 200):
        file = io.BytesIO()
        Image.new("RGB", (5, 4), (shade, 0, 7)).save(file, "png")
        frames.append(file.getvalue())
    shape = {"dimensions": ["-1"]}
    features = declare(
        tmp_path,
        wave=("audio", {"shape": shape, "dtype": "int64", "sampleRate": "8000"}),
        lazy=("audio", {"shape": shape, "dtype": "int32", "lazyDecode": True, "fileFormat": "flac"}),
        video=("video", {"shape": {"dimensions": ["-1", "4", "5", "3"]}, "dtype": "uint8", "encodingFormat": "png"}),
    )
    record = tf_example_pb2.Example()
    record.features.feature["wave"].int64_list.value.extend(samples.tolist())
    record.features.feature["lazy"].bytes_list.value.append(sound.getvalue())
    record.features.feature["video"].bytes_list.value.extend(frames)
    video = np.zeros((2, 4, 5, 3), np.uint8)
    video[0, :, :, 0], video[1, :, :, 0], video[..., 2] = 10, 200, 7
    found = decode_features(features, record.SerializeToString())
    check(found, {"wave": samples.astype(np.int64), "lazy": samples.astype(np.int32), "video": video})
    record.features.feature["lazy"].bytes_list.value[0] = b"no sound"
    with pytest.raises(CorruptExample, match="Unreadable sound: feature 'lazy'"):
        decode_features(features, record.SerializeToString())
    assert "tensorflow" not in sys.modules


def nested_record(**fields):
    """Return a record of nested sequences as tfds writes them, which needs TensorFlow: values and lengths of rows."""
    record = tf_example_pb2.Example()
    for name, (values, *lengths) in fields.items():
        flat = record.features.feature[f"{name}/ragged_flat_values"]
        (flat.float_list if name == "boxes/box" else flat.int64_list).value.extend(values)
        for level, rows in enumerate(lengths):
            record.features.feature[f"{name}/ragged_row_lengths_{level}"].int64_list.value.extend(rows)
    return record.SerializeToString()


def test_nested_sequences_are_arrays_where_their_lengths_are_equal_and_named_where_not(tmp_path):
    inner = F.Sequence({"box": F.Sequence(F.Tensor(shape=(2,), dtype=np.float32))})
    deep = F.Sequence(F.Sequence(F.Sequence(np.int8)))
    F.FeaturesDict({"words": F.Sequence(F.Sequence(np.int32)), "boxes": inner, "deep": deep}).save_config(str(tmp_path))
    features = read_features(tmp_path)
    boxes = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    fields = {
        "words": (range(1, 7), (2, 2, 2)),
        "boxes/box": (boxes.ravel().tolist(), (3, 3)),
        "deep": (range(8), (2,), (4, 4)),
    }
    expected = {
        "words": np.arange(1, 7, dtype=np.int32).reshape(3, 2),
        "boxes/box": boxes,
        "deep": np.arange(8, dtype=np.int8).reshape(1, 2, 4),
    }
    check(decode_features(features, nested_record(**fields)), expected)
    empty = {"words": ([], ()), "boxes/box": ([], (0, 0)), "deep": ([], (), ())}
    shapes = {name: value.shape for name, value in decode_features(features, nested_record(**empty)).items()}
    assert shapes == {"words": (0, 0), "boxes/box": (2, 0, 2), "deep": (0, 0, 0)}
    for wrong, lengths in ((([1, 2, 3, 4, 5], (3, 0, 2)), "3, 0, 2"), (([1], (0, 1)), "0, 1")):
        with pytest.raises(ValueError, match=rf"'words' is ragged: its sequences have the lengths \[{lengths}\]"):
            decode_features(features, nested_record(**fields | {"words": wrong}))
    for lengths in (((2, 1), (1, 1, 6)), ((1, 2), (2, 3, 3))):
        with pytest.raises(ValueError, match="'deep' is ragged"):
            decode_features(features, nested_record(**fields | {"deep": (range(8), *lengths)}))


def test_texts_are_bytes_and_labels_have_their_names(tmp_path):
    features = {
        "text": F.Text(),
        "label": F.ClassLabel(names=["cat", "dog"]),
        "objects": F.Sequence({"kind/of": F.ClassLabel(names=["a", "b", "c"])}),
        "said": F.Translation(("de", "en")),
        "count": F.ClassLabel(num_classes=3),
    }
    example = {
        "text": "Bär",
        "label": "dog",
        "objects": {"kind/of": ["c", "a"]},
        "said": {"de": "ja", "en": "yes"},
        "count": 2,
    }
    found = decoded(tmp_path, features, example)
    assert {n: v.tobytes().decode() for n, v in found.items() if n in ("text", "said/de", "said/en")} == {
        "text": "Bär",
        "said/de": "ja",
        "said/en": "yes",
    }
    assert (found["label"], found["objects/kind/of"].tolist(), found["count"]) == (1, [2, 0], 2)
    names = {feature.name: feature.names for feature in read_features(tmp_path)}
    assert names["label"] == ("cat", "dog")
    assert names["objects/kind/of"] == ("a", "b", "c")
    assert names["text"] == names["count"] == ()


def test_what_is_missing_broken_or_unknown_is_named(tmp_path):
    F.FeaturesDict({"a": np.int64, "texts": F.Sequence(F.Text())}).save_config(str(tmp_path))
    features = read_features(tmp_path)
    with pytest.raises(ValueError, match="no feature 'a'"):
        decode_features(features, tf_example_pb2.Example().SerializeToString())
    with pytest.raises(CorruptExample, match=r"not a tf\.train\.Example"):
        decode_features(features, b"\xff\xff")
    record = tf_example_pb2.Example()
    record.features.feature["texts"].bytes_list.value.extend([b"a", b"bc"])
    with pytest.raises(ValueError, match="'texts' differ in shape"):
        decode_features([f for f in features if f.name == "texts"], record.SerializeToString())
    with pytest.raises(UnknownFeature, match=r"'x' is of the class tensorflow_datasets.core.features.x.Mine"):
        declare(tmp_path, x=("mine", {}))


def test_small_values_of_known_size_are_light():
    image = Feature("image", "image", np.dtype(np.uint8), (28, 28, 1))
    assert image.is_light
    assert Feature("text", "text", np.dtype(np.uint8), (None,)).is_light
    for heavy in ({"shape": (None, None, 3)}, {"shape": (224, 224, 3)}, {"lengths": (100,)}, {"kind": "sound"}):
        assert not dataclasses.replace(image, **heavy).is_light
