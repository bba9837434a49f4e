"""tokenizer.json and its companion files: the same ids as the vocabulary in GGUF; malformed files are refused."""

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ruvllm.checkpoint.tokenizer import load_tokenizer
from ruvllm.errors import ModelFormatError
from tests.checkpoint.tokenizer_cases import NAMES, STRINGS, TOKENIZERS, metadata_of, read
from tests.llm_cases import write_byte_tokenizer


def save_as_tokenizer_json(name, directory, legacy=True):
    """The vocabulary as transformers would store it, with its BOS put before text by a post-processor."""
    metadata = metadata_of(name)
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    if metadata["tokenizer.ggml.model"] == "gpt2":
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        engine = Tokenizer(models.BPE(vocab, merges, ignore_merges=name == "llama3"))
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if name == "llama3" else []
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)]
        )
        engine.decoder = decoders.ByteLevel()
    else:
        scores = metadata["tokenizer.ggml.scores"]
        ranked = sorted((i for i, kind in enumerate(kinds) if kind == 1), key=lambda i: (-scores[i], -len(tokens[i])))
        merges = [
            (tokens[i][:n], tokens[i][n:]) for i in ranked for n in range(len(tokens[i]) - 1, 0, -1)
            if tokens[i][:n] in vocab and tokens[i][n:] in vocab
        ]  # fmt: skip
        engine = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        if legacy:
            engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            engine.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        engine.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (2, 3)]
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos, eos = {"llama3": special[:2], "gpt2": special * 2}.get(name, ["<s>", "</s>"])
    if name != "gpt2":
        engine.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    engine.enable_truncation(3)
    engine.enable_padding(length=50)
    engine.save(str(directory / "tokenizer.json"))
    config = {"bos_token": bos, "eos_token": {"content": eos, "lstrip": False}, "chat_template": "from the config"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return vocab[bos], vocab[eos]


@pytest.mark.parametrize("name", NAMES[:4])  # the others: test_families.py
@pytest.mark.parametrize("legacy", [True, False])
def test_a_hugging_face_directory_gives_the_same_ids(name, legacy, tmp_path):
    bos, eos = save_as_tokenizer_json(name, tmp_path, legacy)
    tokenizer = load_tokenizer(tmp_path)
    from_gguf = TOKENIZERS[name]
    assert tokenizer.vocab_size == from_gguf.vocab_size
    assert tokenizer.special_ids == from_gguf.special_ids
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (bos, from_gguf.eos_ids) and tokenizer.eos_ids[0] == eos
    prefix = [] if name == "gpt2" else [bos]
    for text, ids in zip(STRINGS, read(name)["ids"], strict=True):
        if text.startswith(" ") and not legacy:
            continue  # there a space that is in the text already is taken for the one to be added
        assert tokenizer.encode(text, add_special=False, parse_special=False) == ids, text
        assert tokenizer.encode(text, parse_special=False) == prefix + ids
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream_decoder()
        assert "".join(map(stream.push, ids)) + stream.finish() == text


def test_what_the_files_beside_tokenizer_json_say(tmp_path):
    save_as_tokenizer_json("mistral_v1", tmp_path)
    assert load_tokenizer(tmp_path).chat_template == "from the config"
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer(str(tmp_path)).eos_ids == (2, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 2, 8, 99999]}')
    (tmp_path / "chat_template.jinja").write_text("from its own file é", "utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == (2, 9, 8)
    assert tokenizer.chat_template == "from its own file é"
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    assert load_tokenizer(tmp_path).chat_template == "yes"


def test_without_a_post_processor_the_config_says_whether_bos_is_added(tmp_path):
    save_as_tokenizer_json("mistral_v1", tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert not load_tokenizer(tmp_path).add_bos
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    assert load_tokenizer(tmp_path).add_bos


def test_named_and_marked_tokens_are_control_tokens_even_if_the_file_forgets_it(tmp_path):
    save_as_tokenizer_json("mistral_v1", tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    size = len(content["model"]["vocab"])
    for token in content["added_tokens"]:
        token["special"] = False
    common = {"single_word": False, "lstrip": False, "rstrip": True, "normalized": False, "special": False}
    content["added_tokens"].append({"id": size, "content": "<|user|>", **common})
    content["added_tokens"].append({"id": size + 1, "content": "<think>", **common})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_ids == {1, 2, size}  # "<unk>" is not named in the configuration, "<think>" is no mark
    assert tokenizer.encode("<|user|>  hi", add_special=False) == [size, *tokenizer.encode("hi", add_special=False)]
    for text in ("<s>", "</s>", "<|user|>"):
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert not tokenizer.special_ids & set(ids)
    assert tokenizer.encode("<think>", add_special=False, parse_special=False) == [size + 1]


def replace(content):
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


def change(content, *path, to):
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = to


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: change(c, "model", "type", to="WordPiece"), "tokenizer.json: tokenizer: found .*"),
        (lambda c: change(c, "model", "dropout", to=0.5), "model: found BPE with dropout 0.5"),
        (lambda c: change(c, "decoder", to=None), "decoder: found none, expected ByteLevel"),
        (lambda c: change(c, "decoder", to={"type": "WordPiece", "prefix": "##", "cleanup": True}), "decoder: found"),
        (lambda c: change(c, "model", "vocab", "a", to=1 << 31), r"vocabulary: found ids below 2147483649"),
        (lambda c: change(c, "model", "merges", to=["a nosuch"]), "tokenizer: found .*nosuch"),
        (lambda c: c.pop("model"), "tokenizer: found"),
        (
            lambda c: change(c, "post_processor", "special_tokens", "<s>", "ids", to=[1502]),
            r"post_processor: found the ids",
        ),
        (lambda c: change(c, "post_processor", "special_tokens", to={}), "tokenizer: found"),  # makes the library panic
        (lambda c: change(c, "normalizer", to=replace("b" * 200)), "normalizer: found steps .* 201 times as long"),
        (
            lambda c: change(c, "normalizer", to={"type": "Sequence", "normalizers": [replace("bbb")] * 9}),
            "normalizer: found steps .* 262144 times as long, expected at most 100 times",
        ),
        (
            lambda c: change(c, "normalizer", to={"type": "Prepend", "prepend": "b" * 200}),
            "normalizer: found steps .* 201 times",
        ),
        (
            lambda c: change(c, "normalizer", to={"type": "Precompiled", "precompiled_charsmap": ""}),
            "(normalizer|tokenizer): found",
        ),
    ],
)
def test_a_damaged_tokenizer_json_is_refused(damage, message, tmp_path):
    save_as_tokenizer_json("mistral_v1", tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    damage(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelFormatError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b"", "tokenizer.json: tokenizer: found"),
        ("tokenizer.json", b"{" * 100000, "tokenizer.json: tokenizer: found"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json"),
        ("tokenizer_config.json", b'{"bos_token": 3}', "bos_token: found 3, expected a string"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template: found int"),
        ("generation_config.json", b'{"eos_token_id": "2"}', "eos_token_id: found '\"?'?2"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: encoding"),
    ],
)
def test_other_damaged_files_are_refused(file, content, message, tmp_path):
    save_as_tokenizer_json("mistral_v1", tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelFormatError, match=message):
        load_tokenizer(tmp_path)


def test_a_pattern_that_takes_for_ever_is_given_up(tmp_path):
    """The library's regular expressions have a limit, beyond which it panics: an error that nobody would catch."""
    write_byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    evil = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [evil, content["pre_tokenizer"]]}
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    for _ in range(2):  # the tokenizer is not left locked
        with pytest.raises(ModelFormatError, match="tokenizer: found .*limit"):
            tokenizer.encode("a" * 40 + "!")
    assert tokenizer.decode(tokenizer.encode("aa")) == "aa"
