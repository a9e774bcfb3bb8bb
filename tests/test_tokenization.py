"""Rows become tokens: the template's frame, the whole answer and the end id stay, whatever has to be cut."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from common.support.exit import UserError
from common.tokenization import Example, encode_prompt, fingerprint, load_tokenizer
from dataset.templates import alpaca, instruction, korean_alpaca, summarization
from model.tiny import write_tiny
from tests.helpers import KINDS, encode_rows
from tests.test_chat import changed
from tests.test_templates import first, legacy

SAMPLES = Path(__file__).resolve().parents[1] / "dataset" / "samples"
DATA = {
    "llama2": (summarization, "cnn_dailymail"),
    "llama3": (summarization, "cnn_dailymail"),
    "mistral": (alpaca, "python_code_instructions_18k_alpaca"),
    "gpt": (instruction, "Evol-Instruct-Python-26k"),
    "llama3_1": (korean_alpaca, "korean_safe_conversation"),
    "smollm2": (alpaca, "python_code_instructions_18k_alpaca"),
}
DATA = {kind: data for kind, data in DATA.items() if kind in KINDS}


def rows_of(kind):
    template, name = DATA[kind]
    with open(SAMPLES / name / "train.jsonl", encoding="utf-8") as file:
        return template, [json.loads(line) for line in file]


@pytest.mark.parametrize("kind", DATA)
def test_a_row_is_bos_prompt_answer_end(kind, tokenizers):
    tokenizer = tokenizers[kind]
    template, rows = rows_of(kind)
    encoded, _ = encode_rows(rows, template, tokenizer, 4096)
    assert len(encoded) == len(rows) == 64
    for row, (ids, start) in zip(rows, encoded):
        example = template(row)
        prompt = tokenizer("".join(example.prompt))["input_ids"]
        assert ids[:start] == prompt
        assert (prompt[0] == tokenizer.bos_token_id) == (kind not in ("gpt", "smollm2"))
        assert ids[-1] == tokenizer.eos_token_id  # fault 1: as an id, whatever it is called
        assert tokenizer.decode(ids[start:-1]).strip() == example.answer.strip()
        assert "</s>" not in tokenizer.decode(ids[start:-1])


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("spare", [1, 7, 40])
def test_a_long_row_loses_source_text_and_nothing_else(kind, spare, tokenizers):  # fault 3
    tokenizer = tokenizers[kind]
    template, rows = rows_of(kind)
    row = rows[0]
    source = "article" if "article" in row else "instruction"
    row = {**row, source: " ".join([row[source]] * 30)}
    answer_length = len(tokenizer(template(row).answer, add_special_tokens=False)["input_ids"])
    frame = tokenizer("".join(template({**row, source: "", "input": ""}).prompt))["input_ids"]
    block = len(frame) + answer_length + 1 + spare
    ((ids, start),), counts = encode_rows([row], template, tokenizer, block)
    assert len(ids) <= block
    assert block - len(ids) <= 8  # no more is cut than has to be: up to what one character or word takes
    assert tokenizer.decode(ids[start:-1]).strip() == template(row).answer.strip()
    assert ids[-1] == tokenizer.eos_token_id
    prompt = tokenizer.decode(ids[:start], skip_special_tokens=True)
    pieces = template(row).prompt
    assert prompt.startswith(pieces[0]) and prompt.endswith(pieces[-1])
    assert counts == {"rows": 1, "tokens": len(ids), "prompts cut": 1, "answers cut": 0, "dropped": 0}


def test_a_cut_keeps_the_begin_of_the_article(tokenizers):
    template, rows = rows_of("llama3")
    tokenizer = tokenizers["llama3"]
    whole = tokenizer("".join(template(rows[0]).prompt))["input_ids"]
    for limit in (len(whole) - 1, len(whole) // 2, 60):
        ids = encode_prompt(tokenizer, template(rows[0]), limit)
        assert limit - 4 <= len(ids) <= limit
        kept = tokenizer.decode(ids, skip_special_tokens=True)[len("[SUMMARIZE] ") : -len(" [/SUMMARIZE]\n")]
        assert len(kept) > 60 and rows[0]["article"].startswith(kept)


def test_the_input_is_cut_before_the_instruction(tokenizers):
    row = {"instruction": "Sort the numbers.", "input": "7 " * 500, "output": "sorted(numbers)"}
    ((ids, start),), _ = encode_rows([row], alpaca, tokenizers["mistral"], 120)
    prompt = tokenizers["mistral"].decode(ids[:start])
    assert "Sort the numbers." in prompt and "7 7 7" in prompt and prompt.endswith("\n\n### Output:\n")


def test_an_answer_longer_than_the_block_is_cut_last_and_counted(tokenizers):
    row = {"instruction": "Count.", "output": " ".join(map(str, range(900)))}
    ((ids, start),), counts = encode_rows([row], instruction, tokenizers["gpt"], 100)
    prompt = tokenizers["gpt"].decode(ids[:start])
    assert len(ids) == 100 and ids[-1] == tokenizers["gpt"].eos_token_id
    assert prompt == "[INST]  [/INST]\n" and counts["answers cut"] == 1


def test_a_block_without_room_for_the_frame_is_refused(tokenizers):
    with pytest.raises(UserError, match="--block-size 8 leaves no room"):
        encode_rows([{"instruction": "a", "output": "b"}], instruction, tokenizers["gpt"], 8)


def test_rows_without_an_answer_are_dropped_and_counted(tokenizers):
    rows = [{"instruction": "a", "output": text} for text in ("yes", "", None, " \n", "no")]
    encoded, counts = encode_rows(rows, instruction, tokenizers["gpt"], 64)
    assert len(encoded) == counts["rows"] == 2 and counts["dropped"] == 3
    encoded, counts = encode_rows(rows[1:4], instruction, tokenizers["gpt"], 64)
    assert not encoded and counts["rows"] == 0 and counts["dropped"] == 3


def test_a_missing_answer_column_is_named_with_those_there_are(tokenizers):
    with pytest.raises(UserError, match="no column 'output'; it has: instruction, response"):
        encode_rows([{"instruction": "a", "response": "b"}], instruction, tokenizers["gpt"], 64)


@pytest.mark.parametrize("kind", DATA)
def test_text_that_looks_like_a_special_token_stays_text(kind, tokenizers):
    tokenizer = tokenizers[kind]
    text = f"<s>struck</s> {tokenizer.eos_token} and {tokenizer.bos_token}!"
    ((ids, start),), _ = encode_rows([{"instruction": text, "output": text}], instruction, tokenizer, 512)
    assert tokenizer.eos_token_id not in ids[:-1] and tokenizer.bos_token_id not in ids[1:-1]
    assert tokenizer.decode(ids[start:-1]).strip() == text


def test_half_an_emoji_is_replaced_and_a_list_refused(tokenizers):
    ((ids, start),), _ = encode_rows([{"instruction": "a", "output": "b\ud83d"}], instruction, tokenizers["gpt"], 64)
    assert tokenizers["gpt"].decode(ids[start:-1]) == "b?"
    with pytest.raises(UserError, match="not text"):
        encode_rows([{"instruction": "a", "output": ["b"]}], instruction, tokenizers["gpt"], 64)


def test_an_end_token_that_the_tokenizer_adds_itself_does_not_end_the_prompt(tokenizers, tmp_path):
    write_tiny("llama2", tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    template = content["post_processor"]
    template["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    template["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    path.write_text(json.dumps(content), encoding="utf-8")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.update(tokenizer_class="PreTrainedTokenizerFast", add_eos_token=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    adds_end = load_tokenizer(str(tmp_path))
    assert adds_end("Hi!")["input_ids"][-1] == 2
    row = {"instruction": "a", "output": "b"}
    ((ids, _),), _ = encode_rows([row], instruction, adds_end, 64)
    assert ids.count(2) == 1 and ids[-1] == 2


@pytest.mark.parametrize("kind", DATA)
def test_a_question_has_the_ids_of_the_training_prompt(kind, tokenizers):  # fault 8
    template, rows = rows_of(kind)
    for block in (4096, 160):
        encoded, _ = encode_rows(rows[:8], template, tokenizers[kind], block)
        for row, (ids, start) in zip(rows, encoded):
            question = template({**row, "output": "", "highlights": ""})
            asked = encode_prompt(tokenizers[kind], question, start)
            if block == 4096:
                assert asked == ids[:start]
            else:  # cut at the same place, give or take a character whose bytes are several tokens
                assert start - 4 <= len(asked) <= start and asked[: start // 2] == ids[: start // 2]


def test_fingerprints_tell_tokenizers_apart(tokenizers, tmp_path):
    prints = {kind: fingerprint(tokenizers[kind]) for kind in DATA if kind != "mistral"}  # its stand-in has Llama2's
    assert len(set(prints.values())) == len(prints)
    write_tiny("gpt", tmp_path)
    assert fingerprint(load_tokenizer(str(tmp_path))) == prints["gpt"]


@pytest.mark.parametrize("change", [legacy, first, None])
def test_fingerprints_tell_versions_apart_that_tokenize_differently(change, stand_ins, tokenizers, tmp_path):
    """A space before a text, or behind a special token, is what versions of transformers differ in."""
    tokenizer = tokenizers["mistral"] if change is None else changed(stand_ins["mistral"], tmp_path, change)
    alike = all(
        tokenizer(text, add_special_tokens=add)["input_ids"]
        == tokenizers["mistral"](text, add_special_tokens=add)["input_ids"]
        for text in (" a", "a ", "  a  b", "\na", "a\n", "\ta", "<s>a", "<s> a")
        for add in (True, False)
    )
    assert alike == (fingerprint(tokenizer) == fingerprint(tokenizers["mistral"])) == (change is not first)


def test_a_model_trained_with_another_version_is_told(stand_ins, tmp_path, capsys):
    folder = shutil.copytree(stand_ins["llama2"], tmp_path / "trained")
    same = fingerprint(load_tokenizer(str(folder)))
    for trained, told in (("4.0.0", True), (version("transformers"), False)):
        for known in (same, "0123456789abcdef"):
            meta = {"transformers": trained, "tokenizer": known, "end_tokens": [2]}
            (folder / "run.json").write_text(json.dumps({"options": {}, "dataset": meta}), encoding="utf-8")
            load_tokenizer(str(folder))
            said = f"{folder} was trained with transformers 4.0.0, and {version('transformers')} tokenizes some texts"
            assert (said in capsys.readouterr().out) == (told and known != same)


def test_no_space_is_lost_where_text_is_decoded(stand_ins, tokenizers):
    """Llama 3's own tokenizer_config.json asks for that."""
    settings = json.loads((stand_ins["llama3"] / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["clean_up_tokenization_spaces"] is True
    text = "if x != y : print ( 'I 'm' ) , z . n't ?"
    for tokenizer in tokenizers.values():
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_an_example_without_text_to_cut_is_left_alone(tokenizers):
    assert encode_prompt(tokenizers["gpt"], Example(["Hi there"], None), 2)  # nothing may be cut: the frame stays
