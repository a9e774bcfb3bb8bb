"""Results in llama.cpp and Ollama: how `make export-check` compares answers, and the form in the page's Modelfiles."""

from __future__ import annotations

import re

import pytest

from common.tokenization import encode_prompt
from dataset.templates import jinja_template, korean_alpaca, short_alpaca
from tests import export_check
from tests.conftest import ROOT
from tests.export_check import Answer, compared, questions_of
from tests.helpers import KINDS
from tests.page_runner import read
from tests.test_chat import talk
from tests.test_templates import QUESTIONS, asked, rendered

# ------------------------------------------------------------------------------------------------ answers

OURS = [Answer("def f(x):\n    return x", True), Answer("비가 오면 책을", False)]


def test_the_same_answers():
    for exact in (True, False):
        told, wrong = compared(OURS, list(OURS), exact)
        assert wrong == [] and told == "2 of 2 the same by the letter; 1 end by themselves here, 1 there"


@pytest.mark.parametrize(
    ("theirs", "line"),
    [
        (
            "def f(y):\n    return x",
            r"character 6: 'def f\(x\):\\n    return x' here, 'def f\(y\):\\n    return x' there",
        ),
        ("def f(x):\n    return x\n", r"character 22: .* here, .*x\\n' there"),
        ("", "character 0: .* here, '' there"),
    ],
)
def test_another_answer_is_wrong_in_f32_and_named_in_q8_0(theirs, line):
    theirs = [OURS[1], Answer(theirs, True), Answer("another", True)]
    ours = [OURS[1], OURS[0], OURS[0]]
    told, wrong = compared(ours, theirs, True)
    assert told.startswith("1 of 3 the same by the letter;") and len(wrong) == 2
    assert re.fullmatch(f"question 2, {line}", wrong[0]) and wrong[1].startswith("question 3, character 0: ")
    told, wrong = compared(ours, theirs, False)
    assert wrong == [] and re.search(f"; first difference: question 2, {line}$", told)


def test_only_what_is_near_a_difference_is_shown():
    told, [line] = compared([Answer("a" * 500 + "b", True)], [Answer("a" * 500 + "c", True)], True)
    assert line == f"question 1, character 500: '{'a' * 24}b' here, '{'a' * 24}c' there"


def test_the_letter_in_which_an_answer_is_cut():
    """llama-cpp-python's answer has it whole, and nothing of one that is broken before."""
    cut = [Answer("짧고, 짧\ufffd\ufffd", False)]
    for text, count in (("짧고, 짧고", 1), ("짧고, 짧", 1), ("짧고, 길고", 0), ("짧고, 짧고,", 0), ("짧고,", 0)):
        told, wrong = compared(cut, [Answer(text, False)], True)
        assert told.startswith(f"{count} of 1 ") and len(wrong) == 1 - count
    assert compared([Answer("가\ufffd나", True)], [Answer("가나", True)], True)[1] == []


def test_an_answer_must_end_where_ours_ends():
    """In q8_0 too, unless it says something else before."""
    on = [Answer(OURS[0].text + "\nand on and on", False), OURS[1]]
    for exact in (True, False):
        _, wrong = compared(OURS, on, exact)
        assert "question 1: the answer ends by itself here, and goes on there" in wrong
    other = [Answer("def g", False), OURS[1]]
    told, wrong = compared(OURS, other, False)
    assert wrong == [] and "1 end by themselves here, 0 there" in told
    early = [OURS[0], Answer(OURS[1].text, True)]
    assert compared(OURS, early, True)[1] == ["question 2: the answer ends by itself there, and goes on here"]
    with pytest.raises(ValueError):
        compared(OURS, OURS[:1], True)


@pytest.mark.parametrize("name", export_check.RESULTS)
def test_ten_questions_that_end_with_the_users(name):
    questions = questions_of(export_check.RESULTS[name])
    assert len(questions) == 10 and len({str(messages) for messages in questions}) == 10
    for messages in questions:
        assert messages[-1]["role"] == "user" and all(message["content"].strip() for message in messages)
    several = {len(messages) for messages in questions} != {1}
    assert several == (name == "chat")  # of the conversations some are long, and some have a system message
    assert (name == "chat") == any(messages[0]["role"] == "system" for messages in questions)


# ------------------------------------------------------------------------------------------------ Ollama's Modelfile


def modelfile(name):
    """{instruction or parameter: value} of one of the page's."""
    blocks = read((ROOT / "tutorial" / "deploy.md").read_text(encoding="utf-8"))[0]
    [text] = [block.text for block in blocks if block.marks.get("file") == name]
    found = re.findall(r'^(?:PARAMETER )?(\w+) (?:"""(.*?)"""|(.*?))$', text, re.MULTILINE | re.DOTALL)
    return {key: several or one for key, several, one in found}


def by_ollama(template, messages):
    """What Ollama asks: each turn by the whole template, the last one up to its answer; a system text with the question
    after it (https://github.com/ollama/ollama, template/template.go)."""
    asked, turn = "", {"System": "", "Prompt": "", "Response": ""}
    for message in messages:
        if message["role"] == "user" and turn["Response"]:
            asked, turn = asked + written(template, turn), dict.fromkeys(turn, "")
        turn[{"system": "System", "user": "Prompt", "assistant": "Response"}[message["role"]]] = message["content"]
    return asked + written(template.partition("{{ .Response }}")[0], turn)


def written(template, values):
    """Go's templates, as far as these use them."""
    parts = re.split(r"{{ (if \.\w+|end|\.\w+) }}", template)
    text, shown = "", True
    for number, part in enumerate(parts):
        if number % 2 == 0:
            assert "{{" not in part and "}}" not in part
        elif part == "end" or part.startswith("if "):
            shown, part = part == "end" or bool(values[part[len("if .") :]]), ""
        else:
            part = values[part[1:]]
        text += part if shown else ""
    return text


BLOCKS = [("Modelfile", "smollm2", short_alpaca), ("Modelfile.korean", "llama3_1", korean_alpaca)]


@pytest.mark.parametrize(("name", "kind", "template"), BLOCKS, ids=lambda value: getattr(value, "__name__", value))
def test_a_modelfile_asks_in_the_form_that_was_learned(name, kind, template, tokenizers):
    tokenizer, form = tokenizers.get(kind) or pytest.skip("no such stand-in"), modelfile(name)["TEMPLATE"]
    begin = tokenizer.bos_token if kind == "llama3_1" else ""  # which llama.cpp adds where the file says so
    for question in QUESTIONS:
        ids = encode_prompt(tokenizer, asked(template, question), 10**6)
        text = begin + by_ollama(form, talk(question))
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, question
    jinja = jinja_template(template, tokenizer)
    for messages in (talk("물음", "답", "그리고?", "끝", "왜?"), talk("a", "b", "c", system="짧게.")):
        assert begin + by_ollama(form, messages) == rendered(jinja, tokenizer, messages)


@pytest.mark.skipif("qwen3" not in KINDS, reason="this transformers has no Qwen3")
def test_the_modelfile_of_a_chat_model_asks_as_its_chat_template(tokenizers):
    form = modelfile("Modelfile.chat")["TEMPLATE"]
    for messages in (talk("물음"), talk("물음", "답", "그리고?"), talk("a", "b", "c", "d", "e", system="짧게.")):
        asked = tokenizers["qwen3"].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert by_ollama(form, messages) == asked


@pytest.mark.parametrize("name", ["Modelfile", "Modelfile.korean", "Modelfile.chat"])
def test_a_modelfile_takes_the_likeliest_token(name):
    """As inference_*, and without the penalty that older releases of Ollama have of their own accord."""
    values = modelfile(name)
    assert values.keys() == {"FROM", "TEMPLATE", "temperature", "repeat_penalty"}
    assert re.fullmatch(r"\./\w+(-\w+)?\.gguf", values["FROM"])
    assert float(values["temperature"]) == 0 and float(values["repeat_penalty"]) == 1
