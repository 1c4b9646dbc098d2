"""Tokenizers of text: byte-level BPE, trained here or loaded from a file, and SentencePiece models.

A document becomes its tokens and an end token. The libraries `tokenizers` and `sentencepiece` do the work.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jaxdist import extras
from jaxdist.data.sources.source import fingerprint_text

END_TOKEN = "<|endoftext|>"
END_TOKENS = (END_TOKEN, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
"""What the end of a document is called in tokenizers of others."""
FILE_NAMES = {".json": "tokenizer.json", ".model": "tokenizer.model"}
_PIECE_CHARACTERS = 2**20
_AROUND = 1000
"""Characters on each side of a place where a document may be cut that are encoded to see whether it may."""


class Tokenizer(Protocol):
    """Turns text into numbers and back.

    Attributes:
      suffix: of its file.
      size: how many different tokens there are, the end token included; a model's `vocab_size`.
      end_token: the number of the token after each document.
    """

    suffix: str
    size: int
    end_token: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the tokens of each text, int64 of one dim, without the end token."""

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of some tokens; end tokens become nothing."""

    def to_bytes(self) -> bytes:
        """Return the contents of a file that `open_tokenizer` reads."""


class BytePairs:
    """A tokenizer of the library `tokenizers`, from its JSON."""

    suffix = ".json"

    def __init__(self, content: bytes, name: str):
        library = extras.require("tokenizers", extra="text")
        try:
            self._tokenizer = library.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises Exception itself
            raise ValueError(
                f"{name} is not a file of the library tokenizers: {error}. Make one of vocab.json and merges.txt by "
                "`tokenizers.ByteLevelBPETokenizer('vocab.json', 'merges.txt').save('tokenizer.json')`."
            ) from error
        _check_drops_nothing(self._tokenizer.to_str(), name)
        # Documents are whole, whatever the file says for the inputs of the model that it came with.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A text that contains the words of the end token does not end there.
        self._tokenizer.encode_special_tokens = True
        self._content = content
        self.size: int = max(self._tokenizer.get_vocab().values(), default=-1) + 1  # numbers may be left out
        found = [self._tokenizer.token_to_id(each) for each in END_TOKENS]
        known = [number for number in found if number is not None]
        if not known:
            raise ValueError(f"A tokenizer needs a token for the end of a document; {name} has none of {END_TOKENS}.")
        self.end_token: int = known[0]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See Tokenizer."""
        try:
            made = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"The tokenizer cannot encode a text: {error}. Add a token for unknown words.") from error
        return [np.asarray(each.ids, np.int64) for each in made]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """See Tokenizer."""
        text: str = self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=True)
        return text

    def to_bytes(self) -> bytes:
        """See Tokenizer."""
        return self._content


class SentencePieces:
    """A model of the library `sentencepiece`."""

    suffix = ".model"

    def __init__(self, content: bytes, name: str):
        library = extras.require("sentencepiece", extra="text")
        try:
            self._model = library.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ValueError(f"{name} is not a SentencePiece model: {error}.") from error
        self._content = content
        self.size: int = self._model.vocab_size()
        self.end_token: int = self._model.eos_id()
        if self.end_token < 0:
            raise ValueError(f"A tokenizer needs a token for the end of a document; {name} has no eos.")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See Tokenizer."""
        return [np.asarray(each, np.int64) for each in self._model.encode(list(texts))]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """See Tokenizer."""
        text: str = self._model.decode([number for number in np.asarray(tokens).tolist() if number != self.end_token])
        return text

    def to_bytes(self) -> bytes:
        """See Tokenizer."""
        return self._content


def _check_drops_nothing(text: str, name: str) -> None:
    """Raise ValueError where a BPE would leave out each character that it does not know."""
    model = json.loads(text)["model"]
    knows_all = model.get("unk_token") is not None or model.get("byte_fallback") or '"ByteLevel"' in text
    if model.get("type") == "BPE" and not knows_all:
        raise ValueError(
            f"{name} would leave out characters that are not in its vocabulary: it has no token for unknown ones "
            "(unk_token), no byte_fallback and no ByteLevel pre-tokenizer. Give it one of these."
        )


def open_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Return the tokenizer of a file, or of a folder that `jaxdist data prepare --tokenizer` made.

    Args:
      path: a `.json` file of the library `tokenizers`, a `.model` file of SentencePiece, or a folder with one of them.

    Raises:
      ValueError: it is none of these, or has no end token.
      MissingExtra: the extra `text` is not installed.
    """
    given = pathlib.Path(path)
    if given.is_dir():
        found = [given / name for name in FILE_NAMES.values() if (given / name).exists()]
        if not found:
            raise ValueError(f"{given} has no tokenizer; `jaxdist data prepare --tokenizer` puts one there.")
        given = found[0]
    if given.suffix not in FILE_NAMES or not given.is_file():
        raise ValueError(
            f"A tokenizer is bpe:SIZE, a .json file of the library tokenizers or a .model file of SentencePiece; got "
            f"{os.fspath(path)!r}."
        )
    content = given.read_bytes()
    return BytePairs(content, str(given)) if given.suffix == ".json" else SentencePieces(content, str(given))


def train_byte_pairs(texts: Iterator[str], size: int) -> BytePairs:
    """Return a byte-level BPE of `size` tokens trained on some texts: 256 bytes, the end token, and pairs of tokens.

    Sennrich et al., "Neural machine translation of rare words with subword units" (2016), on bytes as in GPT-2. It can
    encode any text.

    Raises:
      ValueError: `size` leaves no room for pairs.
    """
    library = extras.require("tokenizers", extra="text")
    if size <= 257:
        raise ValueError(f"A byte-level BPE has more than 257 tokens, the bytes and the end; got bpe:{size}.")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_TOKEN],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BytePairs(tokenizer.to_str().encode(), "the trained tokenizer")


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return a text that is equal for equal tokenizers."""
    return fingerprint_text("tokenizer", tokenizer.to_bytes().hex())


def pieces(path: str) -> Iterator[str]:
    """Yield a document in pieces of about a million characters that end where a line does; together they are all of it.

    Raises:
      ValueError: it is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:  # line ends stay as they are
            while lines := file.readlines(_PIECE_CHARACTERS):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"Text is UTF-8; {path} is not: {error}. Convert it, or make tokens of its bytes.") from error


def encode_document(tokenizer: Tokenizer, path: str) -> np.ndarray:
    """Return the tokens of a whole document, which is encoded in parts, and several at once, where it may be cut.

    Raises:
      ValueError: it is not UTF-8.
    """
    parts: list[list[str]] = [[]]
    before = ""
    for piece in pieces(path):
        if before and _may_part(tokenizer, before, piece[:_AROUND]):
            parts.append([])
        parts[-1].append(piece)
        before = (before + piece)[-_AROUND:]
    return np.concatenate(tokenizer.encode(["".join(part) for part in parts]))


def _may_part(tokenizer: Tokenizer, before: str, after: str) -> bool:
    """Return whether two texts have together the tokens that each has.

    They have not where a tokenizer puts a space before each text, and where a token spans the end of a line.
    """
    together, *apart = tokenizer.encode([before + after, before, after])
    return np.array_equal(together, np.concatenate(apart))


def dtype_of(tokenizer: Tokenizer) -> Any:
    """Return the smallest dtype that holds all tokens."""
    return np.uint16 if tokenizer.size <= 2**16 else np.uint32
