"""Keys of tokenizer files: each is followed as transformers and llama.cpp follow it, means nothing, or is refused."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from ruvllm.checkpoint.tokenizer import Kind, load_tokenizer
from ruvllm.errors import ModelFormatError
from tests.checkpoint.tokenizer_cases import DATA, STRINGS, metadata_of, read

NAMED = json.loads((DATA / "named_tokens.json").read_text())


def write(directory, **files):
    """A directory of a byte-level tokenizer of single bytes and "<s>", and JSON files of these contents beside it."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    engine = Tokenizer(models.BPE(vocabulary, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken("<s>", normalized=False)])
    if files.pop("bos", False):
        engine.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    engine.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def gguf_file(name="llama3", **changes):
    metadata = {key: value for key, value in metadata_of(name, **changes).items() if value is not None}
    return SimpleNamespace(path="model.gguf", metadata=metadata)


# Tokens beside tokenizer.json


@pytest.mark.parametrize("case", NAMED["cases"])
def test_tokens_beside_tokenizer_json_are_read_as_transformers_reads_them(case, tmp_path):
    golden = NAMED["cases"][case]
    tokenizer = load_tokenizer(write(tmp_path, **golden["files"]))
    assert tokenizer.encode(NAMED["text"]) == golden["ids"]
    for i, (content, special) in golden["added"].items():
        assert tokenizer.id_to_piece(int(i)) == content
        assert (int(i) in tokenizer.special_ids) == special, content
    assert tokenizer.special_tokens.items() >= golden["names"].items()
    if golden["eos_id"] is not None:
        assert tokenizer.eos_ids[0] == golden["eos_id"]
    assert tokenizer.vocab_size == max(map(int, [*golden["added"], 256])) + 1


def test_tokens_that_are_listed_as_control_tokens_of_chats(tmp_path):
    listed = {"added_tokens_decoder": {"257": {"content": "<think>"}, "258": {"content": "<b>"}}}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_config={**listed, "chat_control_tokens": ["<think>"]}))
    assert tokenizer.special_ids == {256, 257}


def test_a_listed_token_that_would_get_another_id_is_refused(tmp_path):
    listed = {"300": {"content": "<|im_end|>", "special": True}}
    with pytest.raises(ModelFormatError, match=r"found the id 300 for '<\|im_end\|>', expected 257, the next"):
        load_tokenizer(write(tmp_path, tokenizer_config={"added_tokens_decoder": listed}))


def test_padding_that_has_no_row_is_left_out_and_an_end_token_is_not(tmp_path, caplog):
    write(tmp_path, tokenizer_config={"pad_token": "<pad>"})
    tokenizer = load_tokenizer(tmp_path, 257)
    assert tokenizer.vocab_size == 257 and max(tokenizer.encode("<pad>")) < 256
    assert f"{tmp_path}: no row of the embedding for <pad>: left out" in caplog.text
    listed = {"257": {"content": "<pad>", "special": True}}
    assert load_tokenizer(write(tmp_path, tokenizer_config={"added_tokens_decoder": listed}), 257).vocab_size == 257
    assert load_tokenizer(tmp_path, 258).encode("<pad>") == [257]
    write(tmp_path, tokenizer_config={"eos_token": "<end>"})
    with pytest.raises(ModelFormatError, match="found 258 tokens, expected at most 257"):
        load_tokenizer(tmp_path, 257)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder: found 'x'"),
        ("tokenizer_config", {"added_tokens_decoder": {"1": "a"}}, "added_tokens_decoder: found '1': 'a'"),
        ("tokenizer_config", {"added_tokens_decoder": [1]}, "added_tokens_decoder: found"),
        ("tokenizer_config", {"eos_token": {"content": "a", "lstrip": 1}}, "eos_token: found .*flags"),
        ("tokenizer_config", {"eos_token": {"content": ""}}, "eos_token: found {'content': ''}, expected a string"),
        ("tokenizer_config", {"additional_special_tokens": "a"}, "additional_special_tokens: found 'a'"),
        ("tokenizer_config", {"extra_special_tokens": [3]}, "extra_special_tokens: found 3"),
        ("special_tokens_map", {"eos_token": 3}, "special_tokens_map.json: eos_token: found 3"),
        ("added_tokens", {"<x>": "257"}, "added_tokens.json: <x>: found"),
        # Keys that ask for what is not done here.
        ("tokenizer_config", {"split_special_tokens": True}, "split_special_tokens: found true, expected false"),
        ("tokenizer_config", {"fast_tokenizer_files": ["tokenizer.4.0.json"]}, "fast_tokenizer_files: found"),
        (
            "tokenizer_config", {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True},
            "add_prefix_space: found true, expected false, as in tokenizer.json",
        ),
        ("generation_config", {"suppress_tokens": [5]}, r"suppress_tokens: found \[5\], expected \[\]: no other"),
        ("generation_config", {"forced_eos_token_id": 2}, "forced_eos_token_id: found 2, expected nothing"),
        ("generation_config", {"bad_words_ids": [[1]]}, "generation_config.json: bad_words_ids: found"),
        ("generation_config", {"no_repeat_ngram_size": 3}, "no_repeat_ngram_size: found 3, expected 0"),
        ("generation_config", {"stop_strings": [3]}, r"stop_strings: found \[3\], expected a string or a list"),
    ],
)  # fmt: skip
def test_what_is_damaged_or_not_done_is_refused_by_its_key(file, content, message, tmp_path):
    with pytest.raises(ModelFormatError, match=message):
        load_tokenizer(write(tmp_path, **{file: content}))


def test_keys_that_change_nothing_are_no_reason_to_refuse(tmp_path):
    write(
        tmp_path,
        tokenizer_config={
            "model_max_length": 1e30, "padding_side": "left", "clean_up_tokenization_spaces": True, "legacy": True,
            "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "split_special_tokens": False,
            "additional_special_tokens": None, "added_tokens_decoder": None, "pad_token": None, "add_bos_token": True,
            "image_token": None, "unk_token": "", "extra": {"content": 1},
        },
        generation_config={
            "do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "suppress_tokens": None,
            "no_repeat_ngram_size": 0, "guidance_scale": 1.0, "bad_words_ids": [],
        },
    )  # fmt: skip
    assert load_tokenizer(tmp_path, 257).encode("a") == [64]


def test_the_regular_expression_of_mistral_is_mended_where_the_directory_says_so(tmp_path):
    """What transformers does with `fix_mistral_regex`: the first of the steps is Mistral's own (`tekken`)."""
    write(tmp_path, tokenizer_config={"fix_mistral_regex": True})
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    wrong = pre_tokenizers.Split(Regex(r"\p{L}+|\s+|[^\s\p{L}]+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    content["pre_tokenizer"] = json.loads(pre_tokenizers.Sequence([wrong, byte_level]).__getstate__())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {"ab": 257, "abC": 258, "abCD": 259} | {f"<{i}>": i for i in range(260, 100_100)}
    content["model"]["merges"] = [["a", "b"], ["ab", "C"], ["abC", "D"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).encode("abCD") == [257, 34, 35]  # lower, then upper case: two words
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).encode("abCD") == [259]


# One fact, several files


IDS = {"bos_token_id": 256, "eos_token_id": 65}


@pytest.mark.parametrize(
    ("files", "bos", "add", "names"),
    [
        ({"bos": True, "config": {}}, 256, True, {"bos_token": "<s>"}),
        ({"bos": True, "config": IDS}, 256, True, {"bos_token": "<s>", "eos_token": "b"}),
        # What encoding does comes before a name that says otherwise.
        ({"bos": True, "tokenizer_config": {"bos_token": "b"}}, 256, True, {"bos_token": "b"}),
        ({"tokenizer_config": {"bos_token": "b"}, "config": IDS}, 65, False, {"bos_token": "b", "eos_token": "b"}),
        ({"config": IDS}, 256, False, {"bos_token": "<s>", "eos_token": "b"}),
        ({"config": IDS, "generation_config": {"bos_token_id": 64}}, 64, False, {"bos_token": "a", "eos_token": "b"}),
        ({"config": {"bos_token_id": 9999}}, None, False, {}),
    ],
)
def test_the_token_that_begins_a_text_is_found_wherever_it_stands(files, bos, add, names, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, **files))
    assert tokenizer.encode("z") == ([256, 89] if add else [89])
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.special_tokens) == (bos, add, names)


def test_a_directory_ends_where_its_gguf_file_ends(tmp_path):
    """llama.cpp ends a generation at tokens that it knows by their spelling, whatever the file lists."""
    more = {"additional_special_tokens": ["<|eot_id|>", "<|start_header_id|>"], "eos_token": "<|end_of_text|>"}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_config=more))
    assert [tokenizer.id_to_piece(i) for i in tokenizer.eos_ids] == ["<|end_of_text|>", "<|eot_id|>"]
    harmony = {"additional_special_tokens": ["<|return|>", "<|call|>", "<|end|>"]}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_config=harmony))
    assert [tokenizer.id_to_piece(i) for i in tokenizer.eos_ids] == ["<|return|>", "<|call|>"]


# GGUF


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("add_sep_token", True), ("remove_extra_whitespaces", True), ("normalizer.lowercase", True),
        ("normalizer.strip_accents", True), ("precompiled_charsmap", np.array([1, 2], np.uint8)),
        ("suppress_tokens", [3]),
    ],
)  # fmt: skip
def test_a_gguf_key_that_asks_for_what_is_not_done_is_refused(key, value):
    key = f"tokenizer.ggml.{key}"
    with pytest.raises(ModelFormatError, match=f"model.gguf: {key}: found .*, expected (false|\\[\\]): no other"):
        load_tokenizer(gguf_file(**{key: value}))
    neutral = False if value is True else value[:0]
    assert load_tokenizer(gguf_file(**{key: neutral})).encode("a")


def test_a_gguf_key_that_is_not_known_is_named(caplog):
    load_tokenizer(gguf_file(token_type_count=1, fim_pre_token_id=3, **{"tokenizer.ggml.frobnicate": 1}))
    assert [r.getMessage() for r in caplog.records] == [
        "model.gguf: the key tokenizer.ggml.frobnicate is not known and not followed"
    ]


def test_gguf_keys_that_end_a_generation():
    tokenizer = load_tokenizer(gguf_file(fim_pad_token_id=7, fim_rep_token_id=8, fim_sep_token_id=9))
    assert {7, 8, 9} < set(tokenizer.eos_ids)
    assert not {7, 8, 9} & tokenizer.special_ids  # they stay what the file says that they are
    assert load_tokenizer(gguf_file(eos_token_ids=np.array([4, 5], np.int32))).eos_ids[:2] == (4, 5)
    for wrong in ([-1], [99999], [0.5]):
        with pytest.raises(ModelFormatError, match="tokenizer.ggml.eos_token_ids: found"):
            load_tokenizer(gguf_file(eos_token_ids=wrong))


def test_rows_without_a_token_have_no_text():
    """As in llama.cpp; the name is its converter's."""
    data = gguf_file("gpt2").metadata
    tokens, kinds = data["tokenizer.ggml.tokens"], data["tokenizer.ggml.token_type"]
    padded = gguf_file("gpt2", tokens=[*tokens, "[PAD1112]"], token_type=[*kinds, Kind.UNUSED])
    tokenizer = load_tokenizer(padded)
    assert tokenizer.decode([len(tokens), 0]) == tokens[0]
    assert len(tokens) not in tokenizer.encode("[PAD1112]")


def test_a_file_without_a_pre_tokenizer_is_split_as_its_vocabulary_tells(caplog):
    with caplog.at_level(logging.WARNING):
        old = load_tokenizer(gguf_file(pre=None))
    assert "model.gguf: the key tokenizer.ggml.pre is missing; split as 'llama-bpe'" in caplog.text
    for text, ids in zip(STRINGS, read("llama3")["ids"], strict=True):
        assert old.encode(text, add_special=False, parse_special=False) == ids, text


@pytest.mark.parametrize(
    ("controls", "pre"),
    [(["<｜begin▁of▁sentence｜>", "<｜fim▁hole｜>", "<|EOT|>"], "deepseek-coder"), (["<|endoftext|>"], "default")],
)
def test_other_vocabularies_without_a_pre_tokenizer(controls, pre, caplog):
    data = gguf_file().metadata
    kinds = data["tokenizer.ggml.token_type"]
    plain = [token for token, kind in zip(data["tokenizer.ggml.tokens"], kinds, strict=True) if kind == 1]
    changes = {"tokens": plain + controls, "token_type": [1] * len(plain) + [3] * len(controls)}
    tokenizer = load_tokenizer(gguf_file(pre=None, **changes))
    assert f"pre is missing; split as {pre!r}" in caplog.text
    golden = read("pre")
    for text, ids in zip(golden["texts"], golden["ids"][pre], strict=True):
        if max(ids) < len(plain):
            assert tokenizer.encode(text, add_special=False, parse_special=False) == ids, text
