"""The Jinja form of each prompt template: chat clients ask a trained model in the format of its training."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.chat_template import encode_conversation, get_chat_template
from common.dataset_file import load_dataset
from common.tokenization import Example, encode_prompt, load_tokenizer
from dataset.templates import alpaca, instruction, jinja_template, korean_alpaca, short_alpaca, summarization
from model.save import save_tokenizer
from tests.conftest import ROOT
from tests.helpers import KINDS, tells
from tests.test_chat import by_library, changed, talk
from tests.test_chat_files import give_template, write

TEMPLATES = [summarization, alpaca, short_alpaca, instruction, korean_alpaca]
QUESTIONS = [
    "Who?", "  begins and ends in white space \n\n", "비 오는 날 👍🏽 무엇을 할까요?", "{{ 1 + 1 }} {% raw %} {# no #}",
    '"quoted" \\n \\', "1\n\n### Output:\n2", "[/INST]", "def f(x):\n\treturn x",
]  # fmt: skip


def asked(template, question):
    """The row of an inference script."""
    return template({"article": question, "highlights": "", "instruction": question, "input": "", "output": ""})


def by_clients(tokenizer, messages):
    """As vLLM does it, and transformers' pipeline."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def user(text):
    return {"role": "user", "content": text}


def saved(tokenizer, template, folder):
    """The tokenizer of a result, as plain transformers opens it."""
    folder.mkdir()
    save_tokenizer(tokenizer, folder, jinja_template(template, tokenizer))
    return AutoTokenizer.from_pretrained(folder)


def rendered(jinja, tokenizer, messages):
    return tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_question_has_the_ids_of_the_training_prompt(kind, template, tokenizers, tmp_path):
    ours = tokenizers[kind]
    theirs = saved(ours, template, tmp_path / "saved")
    for question in QUESTIONS:
        expected = encode_prompt(ours, asked(template, question), 10**6)
        assert by_clients(theirs, [user(question)]) == expected, question
        encoded = theirs.apply_chat_template([user(question)], add_generation_prompt=True, return_dict=True)
        assert encoded["input_ids"] == expected
    assert (expected[0] == theirs.bos_token_id) == (kind in WITH_BOS)


def test_the_block_of_an_input_stands_where_a_row_has_one():
    row = {"instruction": "Add them.", "input": "1, 2", "output": "3"}
    assert short_alpaca(row) == alpaca(row)
    for none in ({**row, "input": ""}, {"instruction": "Add them.", "output": "3"}):
        assert "".join(short_alpaca(none).prompt) == "### Instruction:\nAdd them.\n\n### Output:\n"


WITH_BOS = {"llama2", "mistral", "llama3", "llama3_1"}


def legacy(content):
    """SentencePiece's tokenizers that put a space before the text after a special token, too."""
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    content.update(pre_tokenizer=None, normalizer={"type": "Sequence", "normalizers": [prepend, replace]})


def first(content):
    """Those that put it before a text only where nothing is before it."""
    content.update(normalizer=None)
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(("change", "space"), [(legacy, ""), (first, " ")])
def test_the_space_that_sentencepiece_wants(change, space, stand_ins, tmp_path, capsys):
    tokenizer = changed(stand_ins["mistral"], tmp_path, change)
    jinja = jinja_template(alpaca, tokenizer)
    told = "others may tokenize the space after <s> differently" in capsys.readouterr().out
    assert told == bool(space)
    for question in QUESTIONS:
        text = rendered(jinja, tokenizer, [user(question)])
        assert text.startswith(f"<s>{space}### Instruction:")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == encode_prompt(tokenizer, asked(alpaca, question), 10**6), question


# ------------------------------------------------------------------------------------------------ conversations


@pytest.mark.parametrize("kind", KINDS)
def test_each_turn_of_a_conversation_is_a_row_of_the_training(kind, tokenizers):
    tokenizer = tokenizers[kind]
    text = rendered(jinja_template(alpaca, tokenizer), tokenizer, talk("a", "b", "c", system="s"))
    begin = tokenizer.bos_token if kind in WITH_BOS else ""
    space = " " if text[len(begin)] == " " else ""
    assert not space or kind in ("llama2", "mistral")
    frame = begin + space + "### Instruction:\n%s\n\n### Input:\n\n\n### Output:\n"
    assert text == frame % "s\n\na" + "b" + tokenizer.eos_token + frame % "c"


def test_a_message_of_another_role_is_refused_in_its_own_words(tokenizers):
    tokenizer = tokenizers["llama3"]
    with pytest.raises(Exception, match="not on messages of tool"):
        rendered(jinja_template(alpaca, tokenizer), tokenizer, [user("a"), {"role": "tool", "content": "b"}])


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_can_be_learned_by_it(kind, tokenizers, tmp_path):
    """Another training may start from the saved model."""
    tokenizer = saved(tokenizers[kind], instruction, tmp_path / "saved")
    template = get_chat_template(tokenizer)
    messages = talk("물음", " 답 ", "그리고?", "끝", system="짧게.")
    [row] = encode_conversation(template, messages, None, 1024)
    assert row.ids == by_library(tokenizer, messages)
    learned = tokenizer.decode([token for token, in_loss in zip(row.ids, row.mask) if in_loss])
    assert re.sub(r"\s", "", learned) == f"답{tokenizer.eos_token}끝{tokenizer.eos_token}"
    assert template.end_of_turn() == tokenizer.eos_token_id


# ------------------------------------------------------------------------------------- a template of your own


def review(row):
    return Example(['평 "\\": ', row["review"], "\n긍정입니까?\n"], row["label"])


def test_a_template_of_your_own_has_none_unless_you_write_it(tokenizers):
    assert jinja_template(review, tokenizers["llama3"]) == ""
    review.jinja = r"""
{%- set before = "평 \"\\\": " %}
{%- set after = "\n긍정입니까?\n" %}
"""
    for tokenizer in tokenizers.values():
        text = rendered(jinja_template(review, tokenizer), tokenizer, [user("맛있다")])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == encode_prompt(tokenizer, review({"review": "맛있다", "label": ""}), 10**6)


def test_it_is_said_and_the_template_of_the_base_goes_too(ready, warm):
    """Without one a client refuses; the base's would ask in a format that was not learned."""
    give_template(ready)
    (ready / "dataset").unlink()
    shutil.copytree(ROOT / "dataset", ready / "dataset", ignore=shutil.ignore_patterns("samples"))
    source = (ready / "dataset" / "templates.py").read_text(encoding="utf-8")
    (ready / "dataset" / "templates.py").write_text(source.replace("instruction.jinja =", "UNUSED ="), encoding="utf-8")
    for name in ("common", "model"):  # the script imports from the folders next to its own
        (ready / name).unlink()
        shutil.copytree(ROOT / name, ready / name)
    write(ready / "rows.jsonl", [{"instruction": "a", "output": "c"}] * 20)
    words = "--model-name-or-path ./llama3-8b --dataset-name-or-path rows.jsonl --block-size 128 --save-path new.pt"
    said = warm(f"python dataset/prepare_gpt_dataset.py {words}", cwd=ready).stdout
    assert "\nNo chat template will be saved with the model: " in said
    train = "python tutorial/train_llama3.py --max-train-steps 1 --batch-size 4 --eval-rows 0 --save-dir ./new"
    warm(f"{train} --dataset-name-or-path new.pt", cwd=ready)
    assert not AutoTokenizer.from_pretrained(ready / "new").chat_template
    assert AutoTokenizer.from_pretrained(ready / "llama3-8b").chat_template


# ------------------------------------------------------------------------------------------------ in the results

STALE = "{{ 'the template of the base' }}"
TRAIN = "python tutorial/train_llama3.py --max-train-steps 2 --batch-size 8 --lr 1e-3 --eval-rows 0"


@pytest.fixture(scope="module")
def results(base, warm, tmp_path_factory):
    """A folder with a base that has a chat template of its own, in both places, and what was trained of it."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("results") / "work", symlinks=True)
    give_template(folder, STALE)
    (folder / "llama3-8b" / "chat_template.jinja").write_text(STALE)
    warm(f"{TRAIN} --save-dir ./full", cwd=folder)
    warm(f"{TRAIN} --use-lora --save-dir ./adapter", cwd=folder)
    warm("python tutorial/merge_adapter.py --model-name-or-path ./adapter --save-dir ./merged", cwd=folder)
    return folder


@pytest.mark.parametrize("name", ["full", "adapter", "merged"])
def test_the_base_s_own_template_does_not_stay(name, results):
    tokenizer = AutoTokenizer.from_pretrained(results / name)
    assert not (results / name / "chat_template.jinja").exists()
    settings = json.loads((results / name / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["chat_template"] == tokenizer.chat_template
    own = load_tokenizer(str(results / "llama3-8b"))
    expected = encode_prompt(own, summarization({"article": "News!", "highlights": ""}), 1000)
    assert by_clients(tokenizer, [user("News!")]) == expected
    dataset = load_dataset(str(results / "llama3_dataset.pt"), own)
    assert dataset["meta"]["chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize("name", ["full", "merged"])
def test_a_pipeline_answers_as_our_script_does(name, results, warm):
    from transformers import pipeline

    words = f"--model-name-or-path ./{name} --max-new-tokens 12"
    ours = warm(f"python tutorial/inference_llama3.py {words} --prompt 'The bridge is shut.'", cwd=results).stdout
    dtype = {"torch_dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(results / name, **dtype)
    ask = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(results / name))
    messages = ask([user("The bridge is shut.")], max_new_tokens=12, do_sample=False)[0]["generated_text"]
    assert messages[-1]["role"] == "assistant" and messages[-1]["content"].strip()
    assert ours.replace("\n", "").find(messages[-1]["content"].strip().replace("\n", "")) > 0


def test_training_goes_on_from_it_with_conversations_and_with_blocks(results, warm, tmp_path):
    folder = shutil.copytree(results, tmp_path / "work", symlinks=True)
    prepare = "python dataset/prepare_llama3_dataset.py --model-name-or-path ./full --block-size 128 --save-path new.pt"
    write(folder / "talks.jsonl", [{"messages": talk("a", "b", "c", "d", system="s")}] * 20)
    warm(f"{prepare} --dataset-name-or-path talks.jsonl", cwd=folder)
    words = "--model-name-or-path ./full --dataset-name-or-path new.pt --save-dir ./talks"
    warm(f"{TRAIN} {words}", cwd=folder)
    kept = AutoTokenizer.from_pretrained(folder / "talks").chat_template
    assert kept == AutoTokenizer.from_pretrained(folder / "full").chat_template
    settings = json.loads((folder / "talks" / "generation_config.json").read_text(encoding="utf-8"))
    assert settings["eos_token_id"] == load_tokenizer(str(folder / "full")).eos_token_id
    said = warm("python tutorial/inference_qwen3.py --model-name-or-path ./talks --max-new-tokens 2", cwd=folder).stdout
    assert "[SUMMARIZE] 비 오는 날" in said
    done = warm("python tutorial/inference_qwen3.py --model-name-or-path ./full", cwd=folder, ok=None)
    tells(done, "./full was trained with the prompt template summarization")
    evaluate = "python tutorial/evaluate.py --model-name-or-path ./full --rows 1 --max-new-tokens 2"
    assert "Perplexity" in warm(evaluate, cwd=folder).stdout
