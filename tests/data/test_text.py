import io
import itertools
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.cli import main
from jaxdist.data import TokenSource, open_tokenizer, prepare, text

LINES = ["to be or not to be, that is the question\r\n", "whether it is\n", "grüße aus Köln 🎲\n", "\n", " x = 1\n"]


@pytest.fixture(scope="module")
def byte_pairs():
    return text.train_byte_pairs(iter(LINES * 20), 300)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    for number in range(4):
        (folder / f"{number}.txt").write_bytes("".join(LINES[number:] * (5 + number)).encode())
    (folder / "empty.txt").touch()
    return folder


@given(st.lists(st.text(max_size=40), max_size=5))
def test_any_text_comes_back_from_a_byte_level_bpe(byte_pairs, texts):
    for given_text, tokens in zip(texts, byte_pairs.encode(texts), strict=True):
        assert byte_pairs.decode([*tokens, byte_pairs.end_token]) == given_text
        assert all(0 <= token < byte_pairs.size for token in tokens)


def test_a_text_about_end_tokens_does_not_end(byte_pairs):
    quoted = "the token <|endoftext|> ends a document"
    [tokens] = byte_pairs.encode([quoted])
    assert byte_pairs.end_token not in tokens
    assert byte_pairs.decode(tokens) == quoted


def test_training_makes_pairs_and_is_the_same_each_time(byte_pairs):
    assert byte_pairs.size == 300
    [tokens] = byte_pairs.encode(["to be or not to be"])
    assert len(tokens) < 12, "no pair was learned"
    again = text.train_byte_pairs(iter(LINES * 20), 300)
    assert text.fingerprint(again) == text.fingerprint(byte_pairs)
    assert text.fingerprint(text.train_byte_pairs(iter(LINES * 20), 299)) != text.fingerprint(byte_pairs)


def test_pieces_end_at_lines_and_are_all_of_a_document(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_PIECE_CHARACTERS", 30)
    whole = "".join(LINES * 7)
    (tmp_path / "a.txt").write_bytes(whole.encode())
    found = list(text.pieces(str(tmp_path / "a.txt")))
    assert "".join(found) == whole
    assert len(found) > 3
    assert all(piece.endswith("\n") for piece in found)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"Text is UTF-8; .*b.txt is not"):
        list(text.pieces(str(tmp_path / "b.txt")))


def whole_tokens(folder):
    return np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])


def test_documents_become_tokens_with_an_end_after_each(documents, tmp_path):
    made = prepare.prepare(str(documents), tmp_path / "out", shard_size=100, tokenizer="bpe:300", stream=io.StringIO())
    tokens, tokenizer = whole_tokens(tmp_path / "out"), open_tokenizer(tmp_path / "out")
    assert tokens.dtype == np.uint16
    assert made.total == len(tokens)
    notes = json.loads((tmp_path / "out" / "prepared.json").read_text())
    num_bytes = sum(path.stat().st_size for path in documents.glob("*.txt"))
    assert (notes["vocab_size"], notes["bytes_per_token"]) == (300, num_bytes / len(tokens))
    ends = np.flatnonzero(tokens == tokenizer.end_token)
    parts = [tokens[begin:end] for begin, end in itertools.pairwise([0, *(ends + 1)])]
    expected = [path.read_bytes().decode() for path in sorted(documents.glob("?.txt"))]
    assert [tokenizer.decode(part) for part in parts] == expected
    assert not list((tmp_path / "out").glob(".*")), "the encoded documents were left there"
    source = TokenSource(tmp_path / "out", length=20)
    assert source[0]["tokens"].tolist() == tokens[:20].tolist()


class Interrupted(Exception):
    pass


def test_an_interrupted_preparation_encodes_no_document_twice(documents, tmp_path, monkeypatch):
    encode, encoded = text.BytePairs.encode, []

    def counted(self, texts):
        if len(encoded) == 2:
            encoded.append("interrupted")
            raise Interrupted
        encoded.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(text.BytePairs, "encode", counted)
    with pytest.raises(Interrupted):
        prepare.prepare_text(str(documents), tmp_path / "out", "bpe:300", tokens_per_shard=100)
    prepare.prepare_text(str(documents), tmp_path / "out", "bpe:300", tokens_per_shard=100)
    assert len(encoded) == 2 + 1 + 2
    monkeypatch.undo()
    prepare.prepare_text(str(documents), tmp_path / "whole", "bpe:300", tokens_per_shard=100)
    np.testing.assert_array_equal(whole_tokens(tmp_path / "out"), whole_tokens(tmp_path / "whole"))
    with pytest.raises(ValueError, match="holds another preparation"):
        prepare.prepare_text(str(documents), tmp_path / "out", "bpe:290", tokens_per_shard=100)
    assert not list((tmp_path / "out").glob(".*"))


def test_tokenizers_of_others_give_their_librarys_tokens(documents, tmp_path, byte_pairs):
    file = tmp_path / "mine.json"
    theirs = tokenizers.Tokenizer.from_str(byte_pairs.to_bytes().decode())
    theirs.save(str(file))
    assert open_tokenizer(file).encode(LINES)[1].tolist() == theirs.encode(LINES[1]).ids
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 50), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "pieces.model").write_bytes(model.getvalue())
    library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    made = open_tokenizer(tmp_path / "pieces.model")
    assert (made.size, made.end_token) == (library.vocab_size(), library.eos_id())
    assert [tokens.tolist() for tokens in made.encode(LINES)] == library.encode(LINES)
    prepare.prepare_text(str(documents), tmp_path / "out", str(tmp_path / "pieces.model"))
    assert open_tokenizer(tmp_path / "out").decode(whole_tokens(tmp_path / "out")[:12]).startswith("to be")


MODELS = {
    "plain": {},
    "lines are tokens": {"user_defined_symbols": ["\n"]},
    "white space is kept": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "words": {"model_type": "word"},
}


def trained_pieces(settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 50),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return text.SentencePieces(model.getvalue(), "the trained model")


@pytest.fixture(scope="module", params=["byte pairs", *MODELS])
def tokenizer_of_any_kind(request, byte_pairs):
    return byte_pairs if request.param == "byte pairs" else trained_pieces(MODELS[request.param])


@settings(deadline=None, max_examples=50)
@given(lines=st.lists(st.sampled_from([*LINES, "  \n", "be\n\n"]), min_size=1, max_size=12), size=st.integers(1, 60))
def test_a_document_that_is_read_in_pieces_has_the_tokens_of_the_whole(
    tmp_path_factory, tokenizer_of_any_kind, lines, size
):
    path = tmp_path_factory.mktemp("document") / "a.txt"
    path.write_bytes("".join(lines).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_PIECE_CHARACTERS", size)
        found = text.encode_document(tokenizer_of_any_kind, str(path))
    assert found.tolist() == tokenizer_of_any_kind.encode(["".join(lines)])[0].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["TEXTS", "--tokenizer", "bpe:100"], "more than 257 tokens"),
        (["TEXTS", "--tokenizer", "gpt2"], "A tokenizer is bpe:SIZE, a .json file"),
        (["TEXTS", "--tokenizer", "TEXTS"], "has no tokenizer"),
        (["TEXTS", "--tokenizer", "BAD"], "bad.json is not a file of the library tokenizers"),
        (["TABLE", "--tokenizer", "bpe:300"], "A tokenizer is for text"),
    ],
)
def test_mistakes_are_one_message(documents, tmp_path, capsys, arguments, message):
    (tmp_path / "table.csv").write_text("a\n1\n")
    (tmp_path / "bad.json").write_text("{}")
    names = {"TEXTS": documents, "TABLE": tmp_path / "table.csv", "BAD": tmp_path / "bad.json"}
    source, *more = [str(names.get(word, word)) for word in arguments]
    assert main.run(["data", "prepare", source, str(tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err


def test_settings_of_a_tokenizer_for_its_own_model_do_not_cut_documents(byte_pairs, tmp_path):
    theirs = tokenizers.Tokenizer.from_str(byte_pairs.to_bytes().decode())
    theirs.enable_truncation(3)
    theirs.enable_padding(length=9)
    theirs.save(str(tmp_path / "cut.json"))
    ours = open_tokenizer(tmp_path / "cut.json")
    assert ours.encode(LINES)[0].tolist() == byte_pairs.encode(LINES)[0].tolist()


def test_the_size_of_a_vocabulary_with_holes_is_that_of_its_numbers(tmp_path):
    words = tokenizers.models.WordLevel({"a": 0, "b": 70000, "</s>": 1, "?": 2}, unk_token="?")
    tokenizers.Tokenizer(words).save(str(tmp_path / "holes.json"))
    ours = open_tokenizer(tmp_path / "holes.json")
    assert ours.size == 70001
    assert text.dtype_of(ours) == np.uint32


def test_a_tokenizer_that_would_leave_characters_out_is_refused(tmp_path):
    for model in (tokenizers.models.BPE, tokenizers.models.WordLevel):
        made = tokenizers.Tokenizer(model({"a": 0, "</s>": 1}, [] if model is tokenizers.models.BPE else "[UNK]"))
        made.save(str(tmp_path / "x.json"))
        with pytest.raises(ValueError, match=r"would leave out characters|Add a token for unknown words"):
            open_tokenizer(tmp_path / "x.json").encode(["abba"])
