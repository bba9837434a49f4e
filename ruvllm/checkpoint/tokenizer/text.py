"""Token ids of text, and text of token ids, at once or token by token.

The `tokenizers` library splits and merges. The rest is here: which control tokens are read from text, which ids are
put around it, and how ids become bytes again.
"""

from __future__ import annotations

import codecs
import operator
import re
import secrets
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from ruvllm.checkpoint.tokenizer.vocabulary import Kind, Vocabulary, errors_of_the_library, ids_of_kind
from ruvllm.errors import printable


class Tokenizer:
    """Token ids of text, and text of token ids. May be used from several threads.

    Attributes:
        path: the file or directory that it was loaded from.
        vocab_size: ids are 0 .. vocab_size - 1.
        bos_id: the token that begins a text, if any.
        add_bos: whether `encode` puts it there.
        eos_ids: every token that ends a generation, the file's own end token first.
        special_ids: the control tokens: read from text only with ``parse_special``, hidden by ``skip_special``.
        special_tokens: spelling of the named ones, as templates know them (``bos_token``, ``eos_token``, ...).
        stop_strings: texts that end a generation, if the model's files name some.
        chat_template: the model's chat template (Jinja) for every chat, if it has one.
        named_templates: its others by name; for tools, say.
        missing: why text can be neither encoded nor decoded; None if it can.
    """

    def __init__(self, vocabulary: Vocabulary, path: str) -> None:
        self.path = path
        self._v = vocabulary
        self._engine = vocabulary.engine
        self._lock = threading.Lock()  # each use sets the engine's switch encode_special_tokens
        self._bytes: dict[int, bytes] = {}
        self._marks = _Marks()
        self.vocab_size = len(vocabulary.pieces)
        self.bos_id = vocabulary.bos_id
        self.add_bos = vocabulary.bos_id is not None and vocabulary.bos_id in vocabulary.prefix
        self.eos_ids = vocabulary.eos_ids
        self.special_tokens = dict(vocabulary.names)
        self.chat_template = vocabulary.chat_template
        self.stop_strings = vocabulary.stop_strings
        self.named_templates = dict(vocabulary.named_templates)
        self.missing = vocabulary.missing
        self.special_ids = frozenset(ids_of_kind(vocabulary.kinds, Kind.CONTROL, Kind.UNKNOWN))
        self._cut_out = self.special_ids | set(ids_of_kind(vocabulary.kinds, Kind.USER_DEFINED))

    def __repr__(self) -> str:
        return f"<Tokenizer of {printable(self.path)}: {self.vocab_size} tokens>"

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of a text.

        Args:
            text: any text that has a UTF-8 form.
            add_special: add the ids that the model file puts around a text (usually a BOS token, or nothing), unless it
                begins or ends with them already.
            parse_special: read control tokens written in the text (``<|im_start|>``) as such; otherwise they are text
                like any other, and no text yields a control token.

        Characters that a byte-level vocabulary has no bytes for are dropped, as llama.cpp and transformers do.

        Raises:
            TypeError: `text` is not a str.
            ValueError: it contains a lone surrogate.
            ModelFormatError: the file's own patterns cannot be matched with it.
        """
        ids: list[int] = self._encoding(text, parse_special).ids
        if not add_special:
            return ids
        after = list(self._v.suffix)
        return self.with_prefix(ids if after == ids[len(ids) - len(after) :] else ids + after)

    def with_prefix(self, ids: list[int]) -> list[int]:
        """The ids after the model file's prefix of a text (BOS), unless they begin with it already."""
        before = list(self._v.prefix)
        return ids if ids[: len(before)] == before else before + ids

    def encode_marked(self, text: str) -> list[int]:
        """The ids of a text in which control tokens are given by their marks (see `mark`), and only by them."""
        marks = self._marks.within(text)
        if marks:
            with self._lock:
                self._marks.register(self._engine, marks)
        encoding = self._encoding(text, parse_special=False)
        ids: list[int] = encoding.ids
        if marks:  # by their text: in a vocabulary with gaps the marks may get ids that are in use
            # A token that strips the white space around it has that in its text.
            ids = [marks.get(token.strip(), i) for token, i in zip(encoding.tokens, ids, strict=True)]
        return ids

    def mark(self, token_id: int) -> str:
        """A string that stands for a control token in `encode_marked`; no text contains it by chance."""
        return self._marks.of(self._checked(token_id))

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, continuation: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave control tokens out.
            continuation: the ids continue earlier text, so the first of them keeps a leading space. Otherwise the space
                that a SentencePiece vocabulary puts before text is removed.

        Raises: ValueError naming an id out of range, or what is missing.
        """
        self._require()
        spell = _Speller(self, skip_special, continuation)
        return b"".join([spell(i) for i in ids]).decode("utf-8", "replace")

    def stream_decoder(self, *, skip_special: bool = False, continuation: bool = False) -> StreamDecoder:
        """A decoder that is given ids one by one; what it returns adds up to what `decode` returns for all of them."""
        return StreamDecoder(self, skip_special, continuation)

    def id_to_piece(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token (``Ġthe``, ``▁the``, ``<0x0A>``). Raises: ValueError."""
        self._require()
        return self._v.pieces[self._checked(token_id)] or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of text that a token stands for, a leading space included. Raises: ValueError."""
        index = self._checked(token_id)
        found = self._bytes.get(index)
        if found is None:
            found = self._bytes[index] = self._spelt(index)
        return found

    def _encoding(self, text: str, parse_special: bool) -> Any:
        if not isinstance(text, str):
            raise TypeError(f"text: found {type(text).__name__}, expected str")
        self._require()
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            # Python keeps an undecodable byte of a file name or a terminal in this form.
            byte = f" (the byte {code & 0xFF:#04x} of a text that is not UTF-8)" if 0xDC80 <= code <= 0xDCFF else ""
            found = f"the lone surrogate {printable(text[error.start])}{byte}"
            raise ValueError(f"text: found {found} at {error.start}, expected Unicode") from None
        with self._lock:
            self._engine.encode_special_tokens = not parse_special
            with errors_of_the_library(self.path):
                return self._engine.encode(text, add_special_tokens=False)

    def _require(self) -> None:
        if self.missing is not None:
            raise ValueError(self.missing)

    def _checked(self, token_id: int) -> int:
        index = operator.index(token_id)
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id: found {index}, expected 0 to {self.vocab_size - 1}")
        return index

    def _spelt(self, token_id: int) -> bytes:
        piece, kind = self._v.pieces[token_id] or "", self._v.kinds[token_id]
        if kind == Kind.UNUSED:  # a row of the embedding without a token, "[PAD318]" in GGUF: llama.cpp shows none
            return b""
        if kind == Kind.BYTE:
            return bytes([int(piece[3:5], 16)])
        if token_id in self._cut_out:
            return piece.encode()
        if self._v.byte_level:
            return b"".join([_LETTERS.get(letter) or letter.encode() for letter in piece])
        return piece.replace("▁", " ").encode()

    def _strips(self, token_id: int | None) -> bool:
        """Whether text after this token (None: at the start) was given a space when it was encoded."""
        if token_id is None:
            return self._v.space_prefix != "never"
        return self._v.space_prefix == "each" and token_id in self._cut_out


class StreamDecoder:
    """Ids to text one by one; a character whose bytes come in several tokens appears when it is complete."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, continuation: bool) -> None:
        self._spell = _Speller(tokenizer, skip_special, continuation)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly none. Raises: ValueError if the id is out of range."""
        return self._utf8.decode(self._spell(token_id))

    def finish(self) -> str:
        """What is left: U+FFFD for bytes that never became a character, else nothing."""
        return self._utf8.decode(b"", final=True)


class _Speller:
    """The bytes of each id of a sequence; the previous id decides about a leading space."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, continuation: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special else frozenset()
        self._strip = not continuation and tokenizer._strips(None)

    def __call__(self, token_id: int) -> bytes:
        spelt = self._tokenizer.token_bytes(token_id)
        if token_id in self._hidden:
            return b""
        if self._strip and self._tokenizer._v.kinds[token_id] != Kind.BYTE:
            spelt = spelt.removeprefix(b" ")
        self._strip = self._tokenizer._strips(token_id)
        return spelt


class _Marks:
    """Stand-ins for control tokens: four private-use characters drawn at random for this tokenizer, and the id."""

    def __init__(self) -> None:
        self._secret = "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(4))
        self._pattern = re.compile(re.escape(self._secret) + "(.)(.)", re.DOTALL)
        self._known: set[str] = set()

    def of(self, token_id: int) -> str:
        return self._secret + chr(0x100000 + (token_id >> 12)) + chr(0x100000 + (token_id & 0xFFF))

    def within(self, text: str) -> dict[str, int]:
        """The marks in a text, with their ids."""
        found = self._pattern.finditer(text)
        return {m[0]: (ord(m[1]) - 0x100000 << 12) + ord(m[2]) - 0x100000 for m in found}

    def register(self, engine: Any, marks: Mapping[str, int]) -> None:
        """Let the engine cut these marks out of text, as it does the control tokens that they stand for."""
        from tokenizers import AddedToken

        added = engine.get_added_tokens_decoder()
        for mark in marks.keys() - self._known:
            token = added[marks[mark]]
            # Not special: the engine is set to ignore special tokens in text.
            engine.add_tokens(
                [AddedToken(mark, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=False)]
            )
            self._known.add(mark)


def _gpt2_letters() -> dict[str, bytes]:
    """GPT-2's 256 letters and the bytes they stand for: printable Latin-1 itself, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): bytes([byte]) for byte in plain}
    return letters | {chr(0x100 + n): bytes([byte]) for n, byte in enumerate(others)}


_LETTERS = _gpt2_letters()
