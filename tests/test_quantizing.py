"""quantize: files that our loader and the ``gguf`` package read alike, with weights as ggml defines them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import ruvllm
from ruvllm.checkpoint.gguf_metadata import tokenizer_metadata
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.checkpoint.tokenizer import load_tokenizer
from ruvllm.checkpoint.tokenizer.gguf import vocabulary_from_metadata
from ruvllm.checkpoint.tokenizer.hf import vocabulary_from_directory
from ruvllm.cli import main
from ruvllm.errors import ModelFormatError
from ruvllm.quantizing import TYPES, quantize
from tests.llm_cases import write_directory
from tests.model import tiny
from tests.model.model_cases import load, logits

# What floats lose of a number, and the most that a scale may be of the largest number of its group of 32.
LOSS = {"F16": 2**-11, "F32": 0, "BF16": 2**-8}
STEP = {"Q8_0": 1 / 126.9, "Q4_0": 1 / 6.7, "Q4_1": 2 / 14.9}
TEXTS = ("the cat sat", "two  spaces", "abc\nxyz", "1 + 1 = 2", "")


def allowed(kind: str, raw: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The largest error of each number: half a step of its block's scale, which must not be larger than need be."""
    if kind in LOSS:
        return np.maximum(LOSS[kind] * np.abs(expected), 2.0**-25 if kind == "F16" else 0)  # below: subnormal halves
    blocks = raw.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    scales = np.abs(blocks[:, :2].copy().view(np.float16).astype(np.float32))
    assert (scales[:, 0] <= STEP[kind] * np.abs(expected.reshape(-1, 32)).max(axis=1)).all()
    return np.broadcast_to(scales * 0.50001, (len(scales), 32)).reshape(expected.shape)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("case", ["llama3_scaled_gqa", "mlp_bias_f16"])
def test_reads_back_in_both_readers(case: str, type: str, tmp_path: Path) -> None:
    source = tiny.write_gguf(case, tmp_path / "in.gguf")
    path = quantize(source, tmp_path / "out.gguf", type)
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(path)
    assert {t.name: list(t.shape) for t in after.tensors} == {t.name: list(t.shape) for t in before.tensors}
    was = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in before.tensors}
    with open_checkpoint(path) as ours:
        stored = {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in after.tensors}
        raws = {t.name: np.asarray(t.data) for t in after.tensors}
        for name, expected in was.items():
            kind, got = stored[name]
            raw = raws[name]
            assert (np.abs(got - expected) <= allowed(kind, raw, expected)).all(), name
            if expected.ndim == 1:
                assert kind == "F32"
            elif name not in ("token_embd.weight", "output.weight") and expected.shape[1] % 32 == 0:
                assert kind == TYPES[type][0], name
        for name in ("embed", "layers.0.down", "layers.1.gate"):
            np.testing.assert_array_equal(ours.tensor(name).float32(), stored[_gguf_name(name)][1])
    for key, value in before.fields.items():
        if key not in ("general.file_type", "general.quantization_version") and not key.startswith("GGUF."):
            assert after.fields[key].contents() == value.contents(), key
    assert after.fields["general.file_type"].contents() == TYPES[type][1]


def _gguf_name(name: str) -> str:
    return {"embed": "token_embd.weight", "layers.0.down": "blk.0.ffn_down.weight"}.get(name, "blk.1.ffn_gate.weight")


@pytest.mark.parametrize("case", tiny.CASES)
def test_a_directory_gives_the_logits_of_transformers(case: str, tmp_path: Path) -> None:
    """Weights, order of rows, RoPE and window survive the way from a Hugging Face directory."""
    source = write_directory(tmp_path / "in", case)
    path = quantize(source, tmp_path / "out.gguf", "f32")
    ids, expected = tiny.golden(case)
    assert np.abs(logits(load(path), ids) - expected).max() <= 2e-4
    with open_checkpoint(source) as before, open_checkpoint(path) as after:
        assert after.config.sliding_window == before.config.sliding_window
        assert after.config.eos_token_ids == before.config.eos_token_ids
        ours, theirs = load_tokenizer(after.tokenizer_source), load_tokenizer(before.tokenizer_source)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def byte_level_directory(directory: Path, split: pre_tokenizers.PreTokenizer) -> Path:
    """A tokenizer that was trained on this repository's own words."""
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer, engine.decoder = split, decoders.ByteLevel()
    words = (Path(__file__).parents[1] / "docs" / "measuring.md").read_text() * 2
    engine.train_from_iterator(
        [words + " 11 22 222 3333 12345 it's we'll\n\n" * 50],
        trainers.BpeTrainer(vocab_size=900, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    engine.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    engine.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": "{{ messages[0].content }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("name", SPLITS)
def test_byte_level_tokenizers_keep_their_tokens_and_the_name_of_their_split(name: str, tmp_path: Path) -> None:
    directory = byte_level_directory(tmp_path, SPLITS[name])
    values = tokenizer_metadata(directory, 1000)
    assert values["tokenizer.ggml.pre"] == name
    assert len(values["tokenizer.ggml.tokens"]) == 1000 and values["tokenizer.chat_template"].startswith("{{ messages")
    before = vocabulary_from_directory(directory)
    after = vocabulary_from_metadata("out.gguf", values)
    assert after.eos_ids == before.eos_ids and after.chat_template == before.chat_template
    for text in (*TEXTS, "it's 12345 words\n\n we'll  see <|end|>", "naïve 中文"):
        assert after.engine.encode(text).ids == before.engine.encode(text).ids


def test_a_split_that_gguf_has_no_name_for_is_refused(tmp_path: Path) -> None:
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("e", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ModelFormatError, match="pre_tokenizer: found a way to split text that GGUF has no name for"):
        tokenizer_metadata(byte_level_directory(tmp_path, split), 1000)


def sentencepiece_directory(directory: Path, change: Callable[[Tokenizer], object]) -> Path:
    """A tiny model whose tokenizer GGUF can say, with one thing changed."""
    write_directory(directory, "bf16_sharded_tied")
    engine = Tokenizer.from_file(str(directory / "tokenizer.json"))
    change(engine)
    engine.save(str(directory / "tokenizer.json"))
    return directory


def set_parts(**parts: Any) -> Callable[[Tokenizer], object]:
    def change(engine: Tokenizer) -> None:
        for name, part in parts.items():
            setattr(engine, name, part)

    return change


def stripping(**flags: bool) -> Callable[[Tokenizer], object]:
    return lambda engine: engine.add_special_tokens([AddedToken("</s>", normalized=False, **flags)])


SPACES = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]


def metaspace(scheme: str) -> Callable[[Tokenizer], object]:
    return set_parts(normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_parts(normalizer=normalizers.Sequence([normalizers.NFC(), *SPACES])), "it has NFC"),
        (set_parts(normalizer=normalizers.Sequence([normalizers.NFKC(), *SPACES])), "it has NFKC"),
        (set_parts(normalizer=normalizers.Sequence([normalizers.Lowercase(), *SPACES])), "it has Lowercase"),
        (set_parts(normalizer=normalizers.Sequence([*SPACES, normalizers.Replace("a", "b")])), "means another thing"),
        (stripping(lstrip=True), "it has lstrip of </s>"),
        (stripping(rstrip=True), "it has rstrip of </s>"),
        (stripping(single_word=True), "it has single_word of </s>"),
        (metaspace("first"), "it has Metaspace with prepend_scheme first"),
        (metaspace("always"), "it has Metaspace with prepend_scheme always"),  # but not where a space is there already
        (
            set_parts(post_processor=processors.TemplateProcessing("<s> $A b", special_tokens=[("<s>", 1), ("b", 5)])),
            "",
        ),
    ],
)
def test_what_gguf_has_no_words_for_is_refused(
    change: Callable[[Tokenizer], object], says: str, tmp_path: Path
) -> None:
    """Each of these gives other ids in llama.cpp than in `tokenizers`, and did so without a word."""
    directory = sentencepiece_directory(tmp_path / "in", change)
    with pytest.raises(
        ModelFormatError, match=f"in: tokenizer: found .*{says}.*expected what a GGUF file can express"
    ):
        quantize(directory, tmp_path / "out.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("change", "space"),
    [(set_parts(), True), (metaspace("never"), False), (set_parts(normalizer=SPACES[1]), False)],
)
def test_what_gguf_has_words_for_is_written(change: Callable[[Tokenizer], object], space: bool, tmp_path: Path) -> None:
    directory = sentencepiece_directory(tmp_path / "in", change)
    path = quantize(directory, tmp_path / "out.gguf", "f16")
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.add_space_prefix"].contents() is space
    oracle = Tokenizer.from_file(str(directory / "tokenizer.json"))
    with open_checkpoint(path) as checkpoint:
        tokenizer = load_tokenizer(checkpoint.tokenizer_source)
    for text in (*TEXTS, "ab </s> ac</s>ad", " <s> a"):
        assert tokenizer.encode(text, add_special=False) == oracle.encode(text, add_special_tokens=False).ids, text


def test_chats_that_would_change_are_refused(tmp_path: Path) -> None:
    """The ids of texts agree; the template writes a token by a name that GGUF has no key for."""
    directory = byte_level_directory(tmp_path, SPLITS["gpt-2"])
    config = {
        "eos_token": "<|end|>",
        "image_token": "<|end|>",
        "chat_template": "{{ image_token }}{{ messages[0].role }}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFormatError, match="found a chat of 1 messages means another thing in a GGUF file"):
        tokenizer_metadata(directory, 1000)
    (directory / "generation_config.json").write_text(json.dumps({"stop_strings": ["###"]}))
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "image_token": None}))
    with pytest.raises(ModelFormatError, match=r"found stop_strings means another thing.*'###'"):
        tokenizer_metadata(directory, 1000)


@pytest.mark.parametrize(("whole", "name"), [(True, "llama-bpe"), (False, "dbrx")])
def test_words_that_no_merge_makes_decide_between_names_of_one_split(whole: bool, name: str, tmp_path: Path) -> None:
    """The first tokenizer.json files of LLaMA-3 had no `ignore_merges`."""
    directory = byte_level_directory(tmp_path, SPLITS["llama-bpe"])
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = whole
    content["model"]["vocab"]["qzxj"] = content["added_tokens"][0]["id"]
    content["added_tokens"][0]["id"] += 1
    (directory / "tokenizer.json").write_text(json.dumps(content))
    values = tokenizer_metadata(directory, 1000)
    assert values["tokenizer.ggml.pre"] == name
    oracle = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer = load_tokenizer(SimpleNamespace(path="out.gguf", metadata=values))
    assert tokenizer.encode("qzxj") == oracle.encode("qzxj").ids
    assert (len(tokenizer.encode("qzxj")) == 1) == whole


def test_every_end_token_is_written(tmp_path: Path) -> None:
    directory = byte_level_directory(tmp_path, SPLITS["gpt-2"])
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6, 7, 8]}))
    values = tokenizer_metadata(directory, 1000)
    end = vocabulary_from_directory(directory).eos_ids[0]
    assert vocabulary_from_metadata("out.gguf", values).eos_ids == (end, 5, 6, 7, 8)


def test_the_token_that_begins_texts_is_written_wherever_it_stood(tmp_path: Path) -> None:
    """config.json, tokenizer.json and weights; rows that no token has are called as llama.cpp's converter does."""
    directory = write_directory(tmp_path / "in")
    (directory / "tokenizer_config.json").unlink()
    engine = Tokenizer.from_file(str(directory / "tokenizer.json"))
    engine.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    engine.save(str(directory / "tokenizer.json"))
    values = tokenizer_metadata(directory, 100)
    assert (values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.add_bos_token"]) == (1, True)
    assert values["tokenizer.ggml.unknown_token_id"] == 0
    assert values["tokenizer.ggml.tokens"][97:] == ["[PAD97]", "[PAD98]", "[PAD99]"]
    tokenizer = load_tokenizer(SimpleNamespace(path="out.gguf", metadata=values))
    assert tokenizer.encode("hi") == engine.encode("hi").ids
    assert tokenizer.decode([98, *engine.encode("hi").ids[2:], 97]) == "hi"


def test_a_quantised_file_quantised_again_keeps_its_bytes(tmp_path: Path) -> None:
    source = quantize(tiny.write_gguf("llama3_scaled_gqa", tmp_path / "in.gguf"), tmp_path / "a.gguf", "q8_0")
    again = quantize(source, tmp_path / "b.gguf", "q8_0")
    assert again.read_bytes() == source.read_bytes()


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    source = tiny.write_gguf("llama2_mha", tmp_path / "in.gguf")
    with pytest.raises(ValueError, match="^type: expected one of q8_0, q4_0, .*, found 'q3_k'"):
        quantize(source, tmp_path / "out.gguf", "q3_k")
    with pytest.raises(ValueError, match="^target: expected another file than the source"):
        quantize(source, source, "f16", overwrite=True)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        quantize(source, tmp_path / "nowhere" / "out.gguf", "f16")
    target = tmp_path / "there.gguf"
    target.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        quantize(source, target, "f16")
    assert target.read_bytes() == b"precious"
    quantize(source, target, "f16", overwrite=True)
    assert target.read_bytes()[:4] == b"GGUF"


def test_nothing_is_left_of_a_file_that_failed(tmp_path: Path) -> None:
    source = tiny.write_gguf("llama2_mha", tmp_path / "in.gguf")
    raw = bytearray(source.read_bytes())
    at = next(t.data_offset for t in gguf.GGUFReader(source).tensors if t.name == "blk.0.ffn_up.weight")
    raw[at : at + 4] = np.float32(1e6).tobytes()
    source.write_bytes(raw)
    with pytest.raises(ModelFormatError, match="finite numbers that F16 can hold"):
        quantize(source, tmp_path / "out.gguf", "f16")
    assert [p.name for p in tmp_path.iterdir()] == ["in.gguf"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tiny.write_gguf("llama2_mha", tmp_path / "in.gguf"), tmp_path / "out.gguf"
    assert main(["quantize", str(source), str(target), "--type", "q8_0"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert main(["quantize", str(source), str(target), "--type", "q8_0"]) == 2
    assert "out.gguf exists; --force replaces it" in capsys.readouterr().err
    assert main(["quantize", str(source), str(target), "--type", "f16", "--force"]) == 0
    assert main(["quantize", str(source), "--type", "f16"]) == 2
    assert "expected MODEL and OUT.gguf, found 1 arguments" in capsys.readouterr().err
    assert ruvllm.quantize is quantize
