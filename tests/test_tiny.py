"""The stand-ins keep what the real models agree on with their readers: classes, special tokens, ids, file names."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers as tokenizers_package
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.support.exit import UserError
from model import tiny
from model.tiny import write_tiny
from tests.helpers import HAS_LLAMA3_1, HAS_QWEN3, KINDS

ROOT = Path(__file__).resolve().parents[1]
OLD_TOKENIZERS = tuple(map(int, tokenizers_package.__version__.split(".")[:3])) < (0, 20, 1)  # its pull request 1640
TEXTS = [
    "Hi!",
    "안녕하세요! 오늘은 뭐 먹을까요? 뷁, 쀍.",
    "def f(x):\n    if x:\n\treturn  {'a': 1234}\n\n\n        y()",
    "two  spaces,   three,        eight",
    "\n\n### Instruction:\n[INST] it's A0 [/INST]\ttab \n",
    "🙂 é ß <0x0A> ~|^\x7f\r\n",
    "",
]


@pytest.fixture(scope="module")
def tokenizers(stand_ins):
    return {kind: AutoTokenizer.from_pretrained(str(folder)) for kind, folder in stand_ins.items()}


@pytest.fixture(scope="module")
def models(stand_ins):
    return {kind: AutoModelForCausalLM.from_pretrained(str(folder)) for kind, folder in stand_ins.items()}


def check_conventions(kind, tokenizer):
    """What section 5 of the old scripts' faults is about, with the numbers of the real model's files."""
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    last = len(tokenizer) - 1
    assert sorted(tokens) == list(range(last + 1))
    begins_with = {"llama2": 1, "mistral": 1, "llama3": tokenizer.bos_token_id, "llama3_1": tokenizer.bos_token_id}
    ids = tokenizer("Hi!")["input_ids"]
    if kind in begins_with:
        assert ids[0] == begins_with[kind] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
    else:
        assert tokenizer.bos_token_id not in ids
    assert tokenizer.eos_token_id not in ids
    assert tokenizer("Hi!", add_special_tokens=False)["input_ids"] == [i for i in ids if i != tokenizer.bos_token_id]
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    if kind in ("llama2", "mistral"):
        assert named == ("<s>", "</s>", None, "<unk>")
        assert [tokens[i] for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    elif kind in ("llama3", "llama3_1"):
        assert named == ("<|begin_of_text|>", "<|end_of_text|>", None, None)
        size = tokenizer.vocab_size  # as in the real one, the special tokens are not counted
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (size, size + 1)
        if kind == "llama3":
            expected = {6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}
        else:
            expected = {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>"}
        assert {offset: tokens[size + offset] for offset in expected} == expected
        assert size + max(expected) == last
    elif kind == "gpt":
        assert named == ("<|endoftext|>", "<|endoftext|>", None, "<|endoftext|>")
        assert tokenizer.eos_token_id == last == tokenizer.vocab_size - 1
    elif kind == "qwen3":
        size = tokenizer.vocab_size
        assert named == (None, "<|im_end|>", "<|endoftext|>", None)
        own = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
        assert [tokens[size + offset] for offset in range(5)] == own
        assert not {tokenizer.convert_tokens_to_ids("<think>")} & {*tokenizer.all_special_ids}  # text may have it
    else:
        assert named == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
        assert [tokens[i] for i in range(4)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "!"]
    if kind in ("llama3", "llama3_1", "gpt", "qwen3"):
        assert tokens[0] == "!" and tokenizer.decode([0]) == "!"
        assert ids[-1] == 0
    for text in tokenizer.all_special_tokens:  # written in a text, each is one id (so never write one in a text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids(text)]
    assert set(tokenizer("Hi!")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_those_of_the_real_model(kind, tokenizers):
    check_conventions(kind, tokenizers[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back(kind, tokenizers):
    tokenizer = tokenizers[kind]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    # all bytes are there: nothing becomes the unknown token
    everything = tokenizer("".join(map(chr, range(1, 0x2000))), add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in everything


@pytest.mark.parametrize("kind", KINDS)
def test_vocabulary_is_trained_and_small(kind, tokenizers):
    tokenizer = tokenizers[kind]
    assert 1000 <= len(tokenizer) <= 2000
    text = "The function returns the number of words in the list."
    assert len(tokenizer(text)["input_ids"]) < 0.6 * len(text)


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_lead_back_to_the_text(kind, tokenizers):
    tokenizer = tokenizers[kind]
    assert tokenizer.is_fast
    text = "a return value! 안녕 뷁"
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    offsets = encoded["offset_mapping"]
    assert len(offsets) == len(encoded["input_ids"])
    index = encoded["input_ids"].index(tokenizer("x!", add_special_tokens=False)["input_ids"][-1])
    covered = {i for start, end in offsets for i in range(start, end)}
    if kind.startswith("llama3") and OLD_TOKENIZERS:
        # the real Llama3's tokens, too, end where they begin there: nothing of ours may rely on the ends
        assert offsets[index] == (14, 14) and len(covered) < len(text)
    else:
        assert offsets[index] == (14, 15)
        assert covered >= {i for i, character in enumerate(text) if character != " "}
    assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)


@pytest.mark.parametrize("kind", ["llama2", "mistral"])
def test_tokenizer_json_equals_tokenizer_model(kind, stand_ins, tokenizers):
    original = sentencepiece.SentencePieceProcessor(model_file=str(stand_ins[kind] / "tokenizer.model"))
    assert original.get_piece_size() == len(tokenizers[kind])
    assert (original.unk_id(), original.bos_id(), original.eos_id(), original.pad_id()) == (0, 1, 2, -1)
    texts = TEXTS + [text for text in tiny._texts()[:400] if text[:1] != " "] + ["aaaabababaa        aa", "1234567"]
    for text in texts:  # (transformers 5 alone drops one of several leading spaces in Llama2's class)
        assert tokenizers[kind](text)["input_ids"] == [1, *original.encode(text)], text


def test_llama3_splits_words_and_numbers_as_the_real_one(tokenizers):
    words = tokenizers["llama3"].backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345  x\n\nf(y):\n")
    expected = ["it", "'s", " ", "123", "45", " ", " x", "\n\n", "f", "(y", "):\n"]
    assert [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in words] == expected


def check_model(kind, model, size):
    config, names = model.config, {"mistral": "Mistral", "gpt": "GPT2LMHead", "qwen3": "Qwen3"}
    assert type(model).__name__ in (f"{names.get(kind, 'Llama')}ForCausalLM", f"{names.get(kind)}Model")
    positions = {"llama2": 4096, "mistral": 32768, "llama3": 8192, "llama3_1": 131072, "gpt": 2048, "smollm2": 8192}
    positions["qwen3"] = 262144
    assert config.max_position_embeddings == positions[kind]
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 2, 4)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (kind in ("gpt", "smollm2", "qwen3"))
    assert model.get_input_embeddings().weight.shape[0] == config.vocab_size == size
    if kind == "gpt":
        assert config.activation_function == "gelu"
        assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
        return
    assert config.num_key_value_heads == (4 if kind == "llama2" else 2)
    assert getattr(config, "sliding_window", None) == (4096 if kind == "mistral" else None)
    # where the frequencies are kept and named differs between versions, so look at the numbers themselves
    theta = {"llama3": 5e5, "llama3_1": 5e5, "smollm2": 1e5, "qwen3": 5e6}.get(kind, 10000.0)
    head = 32 if kind == "qwen3" else 16  # Qwen3's heads are wider than their share of the width
    assert model.get_decoder().layers[0].self_attn.q_proj.weight.shape == (4 * head, 64)
    expected = [theta ** (-2 * i / head) for i in range(head // 2)]
    if kind == "llama3_1":  # unchanged up to 8192 / 4 positions a turn, 8 times slower from 8192 on
        wanted = [f / 8 if 2 * math.pi / f > 8192 else f for f in expected]
        keep = [i for i, f in enumerate(expected) if not 2048 <= 2 * math.pi / f <= 8192]
        assert {wanted[i] == expected[i] for i in keep} == {True, False}
        expected = wanted
    else:
        keep = list(range(head // 2))
    found = [buffer.float() for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    assert found
    for frequencies in found:
        assert torch.allclose(frequencies[keep], torch.tensor(expected)[keep], rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_model_is_of_the_real_kind_and_runs(kind, models, tokenizers):
    model, tokenizer = models[kind], tokenizers[kind]
    check_model(kind, model, len(tokenizer))
    ids = tokenizer(TEXTS[2], return_tensors="pt")
    with torch.no_grad():
        loss = model(**ids, labels=ids["input_ids"]).loss.item()
    assert abs(loss - math.log(len(tokenizer))) < 1.0  # it knows nothing yet
    out = model.generate(
        **ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    assert out.shape[1] == ids["input_ids"].shape[1] + 5
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.bos_token_id == model.config.bos_token_id == tokenizer.bos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_few_and_small(kind, stand_ins):
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    names |= {"tokenizer.model"} if kind in ("llama2", "mistral") else set()
    assert {file.name for file in stand_ins[kind].iterdir()} == names
    assert sum(file.stat().st_size for file in stand_ins[kind].iterdir()) < 2.5e6
    mask = os.umask(0)
    os.umask(mask)
    assert stand_ins[kind].stat().st_mode & 0o777 == 0o777 & ~mask  # as readable for others as any new directory


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_can_be_saved_and_loaded_again(kind, models, tokenizers, tmp_path):
    models[kind].save_pretrained(str(tmp_path))
    tokenizers[kind].save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    check_conventions(kind, again)
    check_model(kind, AutoModelForCausalLM.from_pretrained(str(tmp_path)), len(again))
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizers[kind](text)["input_ids"]


def hashes(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
def test_same_seed_same_files_in_another_process(stand_ins, tmp_path):
    """Nothing may depend on the order of a set, on what was made before, or on the number of threads."""
    script = "import sys; from model.tiny import *; [write_tiny(k, sys.argv[1] + '/' + k) for k in sys.argv[2:]]"
    environment = dict(os.environ, RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1")
    environment["PYTHONHASHSEED"] = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    command = [sys.executable, "-c", script, str(tmp_path), *reversed(KINDS)]
    subprocess.run(command, check=True, cwd=str(ROOT), env=environment)
    for kind in KINDS:
        assert hashes(tmp_path / kind) == hashes(stand_ins[kind])


def test_seed_changes_the_weights_alone_and_leaves_the_callers_random_numbers(stand_ins, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    write_tiny("llama2", tmp_path / "a", seed=1)
    assert torch.equal(torch.rand(3), expected)
    first, second = hashes(stand_ins["llama2"]), hashes(tmp_path / "a")
    assert {name for name in first if first[name] != second[name]} == {"model.safetensors"}


def test_a_directory_is_written_over_and_the_readers_own_files_stay(stand_ins, tmp_path):
    write_tiny("llama2", tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    write_tiny("llama3", tmp_path)
    found = hashes(tmp_path)
    assert found.pop("notes.txt") == hashlib.sha256(b"mine").hexdigest()
    assert found == hashes(stand_ins["llama3"])  # Llama2's tokenizer.model is gone as well


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "pytorch_model.bin", ".cache/x/y.incomplete"])
def test_a_real_model_is_not_written_over(name, tmp_path):
    weights = tmp_path / "llama3-8b" / name
    weights.parent.mkdir(parents=True)
    with weights.open("wb") as file:
        file.truncate(51 * 2**20)  # takes no room on the disk
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="llama3-8b contains a real model"):
        write_tiny("llama3", tmp_path / "llama3-8b")
    assert sorted(tmp_path.rglob("*")) == before
    with weights.open("wb") as file:
        file.truncate(49 * 2**20)
    write_tiny("llama3", tmp_path / "llama3-8b")


def test_a_file_in_the_place_of_the_directory_is_named_and_kept(tmp_path):
    (tmp_path / "llama3-8b").write_text("mine")
    with pytest.raises(UserError, match="llama3-8b is a file"):
        write_tiny("llama3", tmp_path / "llama3-8b")
    with pytest.raises(UserError, match="llama3-8b is a file, so nothing can be saved in .*llama3-8b/deeper"):
        write_tiny("llama3", tmp_path / "llama3-8b" / "deeper")
    assert hashes(tmp_path) == {"llama3-8b": hashlib.sha256(b"mine").hexdigest()}


def test_ctrl_c_leaves_nothing_behind(stand_ins, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    write_tiny("llama2", tmp_path / "old")
    before = hashes(tmp_path)
    monkeypatch.setattr(tiny, "_save_model", interrupted)
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            write_tiny("llama3", tmp_path / name)
    assert hashes(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_ctrl_c_while_one_replaces_another_leaves_one_of_the_two(stand_ins, tmp_path, monkeypatch):
    """tests/test_files.py kills at each line; here a stand-in is stopped when it is written and not in its place."""
    target = tmp_path / "model"
    write_tiny("llama2", target)
    fsync, calls = os.fsync, []

    def interrupted(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise KeyboardInterrupt
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_tiny("llama3", target)
    assert hashes(tmp_path / "model") == hashes(stand_ins["llama2"]) and list(tmp_path.iterdir()) == [target]
    write_tiny("llama3", target)  # the same command again
    assert hashes(target) == hashes(stand_ins["llama3"])


def test_no_samples_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "SAMPLES", tmp_path / "samples")
    for kind in ("llama2", "gpt"):
        with pytest.raises(UserError, match="have no rows"):
            write_tiny(kind, tmp_path / kind)
    assert list(tmp_path.iterdir()) == []


def test_llama3_1_is_refused_exactly_where_the_real_one_would_not_load(tmp_path):
    if HAS_LLAMA3_1:
        write_tiny("llama3_1", tmp_path / "llama3.1-8b")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "llama3.1-8b").config.rope_scaling["factor"] == 8.0
    else:
        with pytest.raises(UserError, match="transformers>=4.43"):
            write_tiny("llama3_1", tmp_path / "llama3.1-8b")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(HAS_QWEN3, reason="this transformers has Qwen3")
def test_qwen3_is_refused_where_the_real_one_would_not_load(tmp_path):
    with pytest.raises(UserError, match="transformers>=4.51"):
        write_tiny("qwen3", tmp_path / "qwen3-4b")
    assert list(tmp_path.iterdir()) == []


def test_files_have_the_form_that_old_and_new_libraries_read(stand_ins):
    def read(name):
        return json.loads((stand_ins["llama3"] / name).read_text(encoding="utf-8"))

    config, bpe = read("config.json"), read("tokenizer.json")["model"]
    assert config["rope_theta"] == 500000.0 and not {"rope_parameters", "transformers_version"} & set(config)
    assert set(read("generation_config.json")) == {"bos_token_id", "eos_token_id"}
    assert bpe["ignore_merges"] and bpe["merges"] and all(isinstance(merge, str) for merge in bpe["merges"])
