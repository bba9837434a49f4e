"""Tokenizers against llama.cpp, tiktoken and SentencePiece; decoding, streaming, damaged vocabularies."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.checkpoint.tokenizer import Kind, load_tokenizer
from ruvllm.errors import ModelFormatError
from tests.checkpoint.tokenizer_cases import (
    DATA,
    NAMES,
    STRINGS,
    TOKENIZERS,
    from_metadata,
    kinds_of,
    metadata_of,
    read,
    trained_sentencepiece,
)

any_tokenizer = pytest.mark.parametrize("name", NAMES)


def test_smollm2_gives_the_ids_of_llama_cpp(smollm2_path):
    with GGUFFile(smollm2_path) as file:
        tokenizer = load_tokenizer(file)
    for entry in json.loads((DATA / "smollm2_tokens.json").read_text("utf-8")):
        assert tokenizer.encode(entry["text"]) == entry["ids"], entry["text"]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (49152, 1, (2, 0), False)
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.special_ids == frozenset(range(17))


@any_tokenizer
def test_ids_are_those_of_the_reference(name):
    for text, ids in zip(STRINGS, read(name)["ids"], strict=True):
        assert TOKENIZERS[name].encode(text, add_special=False, parse_special=False) == ids, text


@pytest.mark.parametrize("pre", sorted(read("pre")["ids"]))
def test_each_pre_tokenizer_splits_as_its_reference(pre):
    golden = read("pre")
    tokenizer = from_metadata(metadata_of("llama3", pre=pre))
    for text, ids in zip(golden["texts"], golden["ids"][pre], strict=True):
        assert tokenizer.encode(text, add_special=False, parse_special=False) == ids, text


def test_a_word_that_is_a_token_is_not_merged_where_the_model_says_so():
    # Only "ab" and "c" could be merged into "abc", but no merge makes "ab".
    letters = [chr(c) for c in range(33, 127)] + [chr(c) for c in range(161, 324) if c != 173]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*letters, "ab", "abc"],
        "tokenizer.ggml.merges": ["ab c"],
    }
    whole, parts = (
        from_metadata({**metadata, "tokenizer.ggml.pre": pre}).encode("abc") for pre in ("llama-bpe", "gpt-2")
    )
    assert whole == [len(letters) + 1]
    assert parts == [letters.index(letter) for letter in "abc"]


# SentencePiece, live


@pytest.fixture(scope="module", params=["prefix", "no prefix"])
def trained(request):
    """A SentencePiece processor trained on this suite's own strings, and the tokenizer made from its pieces."""
    sp = trained_sentencepiece(1, add_dummy_prefix=request.param == "prefix")
    ids = range(sp.vocab_size())
    return sp, from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in ids],
            "tokenizer.ggml.scores": [sp.get_score(i) for i in ids],
            "tokenizer.ggml.token_type": kinds_of(sp),
            "tokenizer.ggml.add_space_prefix": request.param == "prefix",
        }
    )


plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")) | st.lists(
    st.sampled_from([" ", "  ", "def", "the", "1", "=", "==", "é", "日本", "😀", "\n", "<s>", "<0x0A>"])
).map("".join)


@given(text=plain_text)
def test_sentencepiece_ids_and_text_on_any_string(trained, text):
    sp, tokenizer = trained
    ids = sp.encode(text)
    assert tokenizer.encode(text, add_special=False, parse_special=False) == ids
    assert tokenizer.decode(ids) == sp.decode(ids) == text


def test_sentencepiece_on_long_runs_of_one_character(trained):
    sp, tokenizer = trained
    for character in " =-a_1":
        for length in range(1, 90):
            for text in (character * length, f"x{character * length}the", f" ({character * length})\n"):
                assert tokenizer.encode(text, add_special=False, parse_special=False) == sp.encode(text)


def test_pieces_of_one_score_are_joined_from_the_left_when_they_are_runs():
    # As in Mistral's vocabulary, where runs of spaces share a score: "▁" x 14 and x 16, but no x 15.
    tokenizer = TOKENIZERS["mistral_v1"]
    pieces = [tokenizer.id_to_piece(i) for i in tokenizer.encode(" " * 38, add_special=False)]
    assert [len(piece) for piece in pieces] == [16, 16, 7]


def test_control_tokens_are_not_joined_from_pieces():
    scores = {"<": -1.0, "s": -2.0, ">": -3.0, "<s": -4.0, "<s>": 0.0}
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": list(scores),
        "tokenizer.ggml.scores": list(scores.values()), "tokenizer.ggml.token_type": [1, 1, 1, 1, 3],
        "tokenizer.ggml.add_space_prefix": False,
    }  # fmt: skip
    assert from_metadata(metadata).encode("<s>", add_special=False, parse_special=False) == [3, 2]
    assert from_metadata(metadata).encode("<s>", add_special=False) == [4]


def test_an_unknown_character_is_the_unknown_token_without_byte_pieces():
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "a", "▁"],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0], "tokenizer.ggml.token_type": [2, 1, 1],
    }  # fmt: skip
    assert from_metadata(metadata).encode("a日本a", add_special=False) == [2, 1, 0, 1]


# Special tokens


@any_tokenizer
def test_control_tokens_in_text_are_tokens_or_text(name):
    tokenizer = TOKENIZERS[name]
    for i in tokenizer.special_ids:
        text = tokenizer.id_to_piece(i)
        assert tokenizer.encode(text, add_special=False) == [i]
        as_text = tokenizer.encode(text, add_special=False, parse_special=False)
        assert not tokenizer.special_ids & set(as_text)
        assert tokenizer.decode(as_text) == text
        both = tokenizer.encode(f"one {text}two", add_special=False)
        parts = [tokenizer.encode(part, add_special=False) for part in ("one ", "two")]
        assert both == [*parts[0], i, *parts[1]]


@given(
    parts=st.lists(st.sampled_from(["<", "|", "eot_id", "|>", ">", "<s>", "s", "</", "[INST]", "[", "<|eot_id|>", " "]))
)
def test_no_text_becomes_a_control_token_unparsed(parts):
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode("".join(parts), add_special=False, parse_special=False)
        assert not tokenizer.special_ids & set(ids)
        assert tokenizer.decode(ids) == "".join(parts)


def test_bos_is_added_once():
    tokenizer = TOKENIZERS["mistral_v1"]
    assert tokenizer.add_bos
    once = tokenizer.encode("hi")
    assert once[0] == tokenizer.bos_id == 1
    assert tokenizer.encode("<s>hi") == once
    assert tokenizer.encode("hi", add_special=False) == once[1:]
    assert tokenizer.encode("") == [1]
    assert tokenizer.with_prefix(once) == once


def test_what_goes_round_a_text_is_the_files_choice():
    plain = TOKENIZERS["mistral_v1"].encode("hi", add_special=False)
    both = from_metadata(metadata_of("mistral_v1", add_eos_token=True))
    assert both.encode("hi") == [1, *plain, 2] == both.encode("hi</s>")
    neither = from_metadata(metadata_of("mistral_v1", add_bos_token=False))
    assert neither.encode("hi") == plain
    assert not neither.add_bos
    assert not TOKENIZERS["gpt2"].add_bos
    ends = TOKENIZERS["llama3"].special_ids
    assert from_metadata(metadata_of("llama3", bos_token_id=min(ends))).add_bos  # LLaMA-3's custom, not in the file


def test_end_tokens_are_found_by_their_names_too():
    tokenizer = TOKENIZERS["llama3"]
    assert [tokenizer.id_to_piece(i) for i in tokenizer.eos_ids] == ["<|end_of_text|>", "<|eot_id|>"]
    eot = tokenizer.eos_ids[-1]
    assert from_metadata(metadata_of("llama3", eos_token_id=eot)).eos_ids == (eot, tokenizer.eos_ids[0])
    # A file that calls it user-defined errs; it must not be read from text that may not have control tokens.
    kinds = metadata_of("llama3")["tokenizer.ggml.token_type"]
    kinds[eot] = Kind.USER_DEFINED
    assert from_metadata(metadata_of("llama3", token_type=kinds)).special_ids == tokenizer.special_ids


def test_user_defined_tokens_are_always_read_from_text():
    kinds = metadata_of("mistral_v1")["tokenizer.ggml.token_type"]
    plain = TOKENIZERS["mistral_v1"]
    word = plain.encode("word", add_special=False)[0]
    kinds[word] = Kind.USER_DEFINED
    tokens = metadata_of("mistral_v1")["tokenizer.ggml.tokens"]
    tokens[word] = "a word"
    tokenizer = from_metadata(metadata_of("mistral_v1", token_type=kinds, tokens=tokens))
    for parse in (True, False):
        ids = tokenizer.encode("1a wordB", add_special=False, parse_special=parse)
        assert ids == [*plain.encode("1", add_special=False), word, *plain.encode("B", add_special=False)]
        assert tokenizer.decode(ids) == "1a wordB"
    assert word not in tokenizer.special_ids


# Decoding


@any_tokenizer
def test_encoding_and_decoding_are_inverse(name):
    tokenizer = TOKENIZERS[name]
    for text in STRINGS:
        for parse in (True, False):
            assert tokenizer.decode(tokenizer.encode(text, add_special=False, parse_special=parse)) == text


@any_tokenizer
def test_streaming_adds_up_to_decoding_and_never_shows_half_a_character(name):
    tokenizer = TOKENIZERS[name]
    rng = random.Random(3)
    everything = list(range(tokenizer.vocab_size))
    split = tokenizer.encode("👩‍👩‍👧 日本 é𠀀", add_special=False)
    special = sorted(tokenizer.special_ids)
    for n in range(400):
        ids = rng.choices(everything, k=n % 23) + rng.choices(split, k=n % 7) + rng.choices(special, k=n % 3)
        rng.shuffle(ids)
        how = {"skip_special": n % 2 == 0, "continuation": n % 5 == 0}
        stream = tokenizer.stream_decoder(**how)
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, **how)
    stream = tokenizer.stream_decoder(continuation=True)
    shown = [stream.push(i) for i in split]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(shown)
    assert "" in shown  # some character did come in parts
    assert "".join(shown).strip() == "👩‍👩‍👧 日本 é𠀀"
    assert stream.finish() == ""


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    tokenizer = TOKENIZERS["mistral_v1"]
    half = [i for i in range(tokenizer.vocab_size) if tokenizer.id_to_piece(i) in ("<0xF0>", "<0x9F>")]
    stream = tokenizer.stream_decoder()
    assert [stream.push(i) for i in reversed(half)] == ["", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert tokenizer.decode([*reversed(half), 1]) == "\N{REPLACEMENT CHARACTER}<s>"


def test_the_leading_space_of_sentencepiece():
    tokenizer = TOKENIZERS["mistral_v1"]
    ids = tokenizer.encode("the word", add_special=False)
    assert tokenizer.id_to_piece(ids[0]) == "▁the"
    assert tokenizer.token_bytes(ids[0]) == b" the"
    assert tokenizer.decode(ids) == "the word"
    assert tokenizer.decode(ids, continuation=True) == " the word"
    assert tokenizer.decode([1, *ids, 2]) == "<s>the word</s>"
    assert tokenizer.decode([1, *ids, 2, *ids], skip_special=True) == "the word the word"
    space = [i for i in range(tokenizer.vocab_size) if tokenizer.id_to_piece(i) == "<0x20>"]
    assert tokenizer.decode(space) == " "  # a byte is a byte
    bare = from_metadata(metadata_of("mistral_v1", add_space_prefix=False))
    assert bare.decode(ids) == " the word"


@any_tokenizer
def test_ids_out_of_range_are_named(name):
    tokenizer = TOKENIZERS[name]
    size = tokenizer.vocab_size
    for wrong in (-1, size, 1 << 40):
        for call in (tokenizer.id_to_piece, tokenizer.token_bytes, tokenizer.stream_decoder().push):
            with pytest.raises(ValueError, match=f"token id: found {wrong}, expected 0 to {size - 1}"):
                call(wrong)
        with pytest.raises(ValueError, match=f"found {wrong}"):
            tokenizer.decode([0, wrong])
    with pytest.raises(TypeError):
        tokenizer.decode([1.0])


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(ValueError, match=r"text: found the lone surrogate \\ud83d at 3"):
        TOKENIZERS["gpt2"].encode("ab \ud83d")
    byte = r"text: found the lone surrogate \\udce9 \(the byte 0xe9 of a text that is not UTF-8\) at 3"
    with pytest.raises(ValueError, match=byte):
        TOKENIZERS["gpt2"].encode(b"caf\xe9".decode("utf-8", "surrogateescape"))
    with pytest.raises(TypeError, match="text: found bytes, expected str"):
        TOKENIZERS["gpt2"].encode(b"ab")


def test_threads_do_not_disturb_each_other():
    tokenizer = TOKENIZERS["llama3"]
    text = "one<|eot_id|>two " * 20
    expected = {parse: tokenizer.encode(text, parse_special=parse) for parse in (True, False)}
    assert expected[True] != expected[False]

    def work(n):
        return all(tokenizer.encode(text, parse_special=parse) == expected[parse] for parse in [n % 2 == 0] * 50)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_marks_stand_for_control_tokens():
    for tokenizer in TOKENIZERS.values():
        i = max(tokenizer.special_ids)
        text = tokenizer.id_to_piece(i)
        before, after = (tokenizer.encode(part, add_special=False, parse_special=False) for part in (f"a {text}", "b"))
        assert tokenizer.encode_marked(f"a {text}{tokenizer.mark(i)}b") == [*before, i, *after]


# Damaged and unknown vocabularies


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("gpt2", "model", "rwkv", "tokenizer.ggml.model: found 'rwkv', expected a tokenizer of kind 'gpt2' or 'llama'"),
        ("gpt2", "model", None, "tokenizer.ggml.model: found null"),
        ("gpt2", "pre", "tiktoken-99", "tokenizer.ggml.pre: found 'tiktoken-99', expected one of "),
        ("gpt2", "tokens", [], "tokenizer.ggml.tokens: found 0 values"),
        ("gpt2", "tokens", ["a", 1], "tokenizer.ggml.tokens: found 2 values, expected an array of strings"),
        ("gpt2", "merges", ["a b c"], "tokenizer.ggml.merges: found 'a b c', expected two tokens and one space"),
        ("gpt2", "merges", ["ab"], "tokenizer.ggml.merges: found 'ab'"),
        ("gpt2", "merges", ["a nosuch"], "tokenizer.ggml.merges: found .*nosuch"),
        ("gpt2", "merges", [3], "tokenizer.ggml.merges: found values that are not strings"),
        ("gpt2", "merges", None, "tokenizer.ggml.merges: found null"),
        ("gpt2", "token_type", [1, 1], "tokenizer.ggml.token_type: found 2 values, expected 1112"),
        ("gpt2", "token_type", "x", "tokenizer.ggml.token_type: found str, expected an array of numbers"),
        ("gpt2", "eos_token_id", 1112, "tokenizer.ggml.eos_token_id: found 1112, expected a token id from 0 to 1111"),
        ("gpt2", "bos_token_id", "1", "tokenizer.ggml.bos_token_id"),
        ("gpt2", "add_bos_token", True, "tokenizer.ggml.bos_token_id: found no such key, expected an id"),
        ("gpt2", "add_bos_token", 1, "tokenizer.ggml.add_bos_token"),
        ("mistral_v1", "scores", None, "tokenizer.ggml.scores: found no such key"),
        ("mistral_v1", "scores", [float("nan")] * 1502, "tokenizer.ggml.scores: found a score that is not finite"),
        ("mistral_v1", "scores", [1.0], "tokenizer.ggml.scores: found 1 values, expected 1502"),
        ("mistral_v1", "token_type", [6] * 1502, "tokenizer.ggml.tokens: found '<unk>', expected a byte"),
    ],
)
def test_a_damaged_vocabulary_is_refused_by_the_key_at_fault(name, key, value, message):
    with pytest.raises(ModelFormatError, match=r"model\.gguf: " + message.replace(".ggml.", r"\.ggml\.")):
        from_metadata(metadata_of(name, **{key: value}))


def test_tokens_that_occur_twice_or_have_no_text():
    tokens = metadata_of("gpt2")["tokenizer.ggml.tokens"]
    with pytest.raises(ModelFormatError, match="found '!' twice, expected each token once"):
        from_metadata(metadata_of("gpt2", tokens=[*tokens[:-1], "!"]))
    kinds = [*metadata_of("gpt2")["tokenizer.ggml.token_type"], Kind.UNUSED, Kind.CONTROL]
    tokenizer = from_metadata(metadata_of("gpt2", tokens=[*tokens, "", ""], token_type=kinds))
    assert tokenizer.decode([len(tokens), 0, len(tokens) + 1]) == tokens[0]
