"""What has learned blocks is asked by chat clients as it has learned: by the chat template beside the saved model."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from common.chat import Chat
from common.chat_of_blocks import chat_of_blocks
from common.chat_rows import encode_conversations
from common.conversation import chat
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.dataset_file import load_dataset
from common.support.exit import UserError
from common.tokenization import Example, encode_prompt, load_tokenizer
from dataset.templates import alpaca, instruction, korean_alpaca, summarization
from model.result import save_tokenizer
from tests.conftest import ROOT
from tests.helpers import KINDS, tells
from tests.test_chat import by_library, talk
from tests.test_chat_files import give_template, write

ROWS = {
    summarization: {"article": "news", "highlights": "short"},
    alpaca: {"instruction": "do", "input": "this", "output": "done"},
    instruction: {"instruction": "do", "output": "done"},
    korean_alpaca: {"instruction": "해", "output": "응"},  # without input, as a row may be
}
QUESTIONS = [
    "Who?", "  begins and ends in white space \n\n", "비 오는 날 👍🏽 무엇을 할까요?", "{{ 1 + 1 }} {% raw %} {# no #}",
    '"quoted" \\n \\', "1\n\n### Output:\n2", "[/INST]", "def f(x):\n\treturn x",
]  # fmt: skip


def asked(template, question, row):
    """The row of an inference script."""
    return template({**dict.fromkeys(row, ""), "article" if "article" in row else "instruction": question})


def by_clients(tokenizer, messages):
    """As vLLM does it, and transformers' pipeline."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def user(text):
    return {"role": "user", "content": text}


def saved(tokenizer, template, row, folder):
    """The tokenizer beside a result, as plain transformers opens it."""
    folder.mkdir(exist_ok=True)
    save_tokenizer(tokenizer, folder, chat_of_blocks(template, row, tokenizer))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", ROWS, ids=lambda template: template.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_question_has_the_ids_of_the_training_prompt(kind, template, tokenizers, tmp_path):
    ours, row = tokenizers[kind], ROWS[template]
    theirs = saved(ours, template, row, tmp_path / "saved")
    for question in QUESTIONS:
        expected = encode_prompt(ours, asked(template, question, row), 10**6)
        assert by_clients(theirs, [user(question)]) == expected, question
        whole = theirs.apply_chat_template([user(question)], add_generation_prompt=True, return_dict=True)
        assert whole["input_ids"] == expected
    starts_with_bos = theirs.bos_token and theirs("a")["input_ids"][0] == theirs.bos_token_id
    assert (expected[0] == theirs.bos_token_id) == bool(starts_with_bos) == (kind in WITH_BOS)


WITH_BOS = {"llama2", "mistral", "llama3", "llama3_1"}

# ------------------------------------------------------------------------------------------------ conversations


@pytest.mark.parametrize("kind", KINDS)
def test_each_turn_of_a_conversation_is_a_row_of_the_training(kind, tokenizers, tmp_path):
    theirs = saved(tokenizers[kind], alpaca, ROWS[alpaca], tmp_path / "saved")
    text = theirs.apply_chat_template(talk("a", "b", "c", system="s"), tokenize=False, add_generation_prompt=True)
    begin = theirs.bos_token if kind in WITH_BOS else ""
    gap = " " if kind in ("llama2", "mistral") and text[len(begin)] == " " else ""
    frame = begin + gap + "### Instruction:\n%s\n\n### Input:\n\n\n### Output:\n"
    assert text == frame % "s\n\na" + "b" + theirs.eos_token + frame % "c"


def test_a_message_of_another_role_is_refused_in_its_own_words(tokenizers, tmp_path):
    theirs = saved(tokenizers["llama3"], alpaca, ROWS[alpaca], tmp_path / "saved")
    with pytest.raises(Exception, match="no messages of tool"):
        by_clients(theirs, [user("a"), {"role": "tool", "content": "b"}])


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_can_be_learned_by_it(kind, tokenizers, tmp_path):
    """Of the base a result, of which another training starts."""
    tokenizer = saved(tokenizers[kind], instruction, ROWS[instruction], tmp_path / "saved")
    own = Chat(tokenizer)
    messages = talk("물음", " 답 ", "그리고?", "끝", system="짧게.")
    [(ids, mask)], _ = encode_conversations([{"messages": messages}], chat, own, 1024)
    assert ids == by_library(tokenizer, messages)
    learned = tokenizer.decode([one for one, with_loss in zip(ids, mask) if with_loss])
    assert re.sub(r"\s", "", learned) == f"답{tokenizer.eos_token}끝{tokenizer.eos_token}"
    assert own.end_of_turn() == tokenizer.eos_token_id


# ------------------------------------------------------------------------------------------------ a reader's own


def review(row):
    return Example(["평: ", row["review"], "\n긍정입니까?\n"], ["부정", "긍정"][row["label"]])


def first(row):
    return Example(["", row["question"], "\n"], row["answer"])


def twice(row):
    return Example(["<Q>", row["question"], "</Q> again: ", row["question"], "\n"], row["answer"])


def odd_frame(row):
    return Example(['TEXT "ANSWER" END\\n {{ }} {% if %}\r\n\t👍 TRIM\n', row["question"], "\u2028QUESTION '\n"], "")


def stripped(row):
    return Example(["Q: ", row["question"].strip(), "\nA: "], row["answer"])


def by_its_input(row):
    if row.get("input"):
        return Example(["### With:\n", row["input"], "\n### Do:\n", row["instruction"], "\n"], row["output"])
    return Example(["### Do:\n", row["instruction"], "\n"], row["output"])


def two_needed(row):
    return Example([row["instruction"], "", "\n", row["input"], "\n"], row["output"])


ANSWERED = {"question": "q", "answer": "a"}
OWN = [
    (review, {"review": "맛있다", "label": 1}, "review"),
    (first, ANSWERED, "question"),
    (twice, ANSWERED, "question"),
    (odd_frame, {**ANSWERED, "more": None, "list": [1]}, "question"),
    (stripped, ANSWERED, "question"),
    (by_its_input, {"instruction": "i", "input": "in", "output": "o"}, "instruction"),
    (by_its_input, {"instruction": "i", "input": "", "output": "o"}, "instruction"),
    (two_needed, {"instruction": "i", "input": "in", "output": "o"}, "instruction"),
]


@pytest.mark.parametrize(("template", "row", "name"), OWN, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("kind", ["llama2", "llama3", "gpt"])
def test_a_readers_own_template(kind, template, row, name, tokenizers, tmp_path):
    theirs = saved(tokenizers[kind], template, row, tmp_path / "saved")
    for question in QUESTIONS:
        if kind == "llama2" and question[0] == " " and template in (first, two_needed):
            continue  # at the very begin SentencePiece takes that space for the one that it puts before a text
        blank = {**row, **({"input": ""} if "input" in row else {}), name: question}
        expected = encode_prompt(tokenizers[kind], template(blank), 10**6)
        assert by_clients(theirs, [user(question)]) == expected, question


def rag(row):
    return Example(["Text: ", row["context"], "\nQuestion: ", row["question"], "\n"], row["answer"])


def upper(row):
    return Example(["Q: ", row["question"].upper(), "\n"], row["answer"])


def from_the_left(row):
    return Example(["Q: ", row["question"].lstrip(), "\n"], row["answer"])


def of_a_list(row):
    return Example(["Q: ", row["turns"][0], "\n"], row["turns"][1])


def control_token(row):
    return Example(["<|begin_of_text|>", row["question"], "\n"], row["answer"])


NONE = [
    (rag, {"context": "c", **ANSWERED}, "puts together context, question"),
    (upper, ANSWERED, "no column of text as it is"),
    (from_the_left, ANSWERED, "gives the token ids"),
    (of_a_list, {"turns": ["q", "a"]}, "no column of text as it is"),
    (control_token, ANSWERED, "gives the token ids"),
]


@pytest.mark.parametrize(("template", "row", "why"), NONE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_form_that_no_chat_template_can_write(template, row, why, tokenizers):
    with pytest.raises(UserError, match=f"{why}.*"):
        chat_of_blocks(template, row, tokenizers["llama3"])


def test_it_is_said_and_the_bases_own_goes_too(ready, warm):
    """Without one a client refuses; the base's would ask in a form that was not learned."""
    give_template(ready)
    with open(ROOT / "dataset" / "templates.py", encoding="utf-8") as file:
        source = file.read().replace('row["instruction"], " [/INST]', 'row["instruction"], row["more"], " [/INST]')
    (ready / "dataset").unlink()
    shutil.copytree(ROOT / "dataset", ready / "dataset", ignore=shutil.ignore_patterns("samples"))
    (ready / "dataset" / "templates.py").write_text(source, encoding="utf-8")
    (ready / "common").unlink()  # the script takes the folder beside its own
    shutil.copytree(ROOT / "common", ready / "common")
    write(ready / "rows.jsonl", [{"instruction": "a", "more": "b", "output": "c", "id": "d"}] * 20)
    words = "--model-name-or-path ./llama3-8b --dataset-name-or-path rows.jsonl --block-size 128 --save-path new.pt"
    said = warm(f"python dataset/prepare_gpt_dataset.py {words}", cwd=ready).stdout
    line = "The model will have no chat template: the template instruction"
    assert [one for one in said.splitlines() if one.startswith(line)] == [] and "Dataset saved" in said
    source = source.replace('"[INST] ", row["instruction"]', '"[INST] ", row["id"], row["instruction"]')
    (ready / "dataset" / "templates.py").write_text(source.replace('row["instruction"]', 'row["what"]'))
    write(ready / "rows.jsonl", [{"what": "a", "more": "b", "output": "c", "id": "d"}] * 20)
    said = warm(f"python dataset/prepare_gpt_dataset.py {words}", cwd=ready).stdout
    assert [one for one in said.splitlines() if one.startswith(f"{line} puts together what, more, id")], said
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
    tells(done, "./full was trained on prompts of the template summarization", "tutorial/inference_llama3.py")
    evaluate = "python tutorial/evaluate.py --model-name-or-path ./full --rows 1 --max-new-tokens 2"
    assert "Perplexity" in warm(evaluate, cwd=folder).stdout
