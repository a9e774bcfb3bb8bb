"""Conversations by the chat template of the model's own tokenizer: its ids, and a loss on the answers alone."""

from __future__ import annotations

import json
import random
import re
import shutil
from copy import deepcopy
from datetime import datetime
from itertools import groupby

import pytest
from common.chat import Chat, chat_of
from common.chat_rows import encode_conversations, encode_question
from common.conversation import chat, checked

from common.dataset_file import stop_token_ids
from common.support.exit import UserError
from common.tokenization import load_tokenizer
from dataset.files import Row
from model.tiny import write_tiny
from tests.helpers import HAS_LLAMA3_1
from tests.test_words import changed

# Templates of our own in the forms of the models', and the tokenizer's kind
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURNS = "{{ '<|im_start|>' + m.role + '\n' + CONTENT + '<|im_end|>\n' }}"
CHATML = "{% for m in messages %}" + TURNS.replace("CONTENT", "m.content") + "{% endfor %}" + ASK
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
STRIPS = CHATML.replace("m.content", "(m.content | trim)")
HEADERS = (
    "{{ bos_token }}DATE{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
    "m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DATE = "{{ 'Today: ' + (strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024') + '\n' }}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant!') }}{% endif %}"
)
INST = (
    "{{ bos_token }}"
    + ALTERNATE
    + ("{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}")
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + ALTERNATE
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LAST_QUESTION = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
)
WITHOUT_THOUGHT = "(m.content if m.role != 'assistant' or loop.index0 > ns.last else m.content.split('</think>')[-1])"
THINKS = (
    LAST_QUESTION + TURNS.replace("CONTENT", WITHOUT_THOUGHT) + "{% endfor %}" + ASK
)  # drops what was thought before
ASKS_TO_THINK = THINKS.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
MOVES = (  # the system text goes to the newest question
    LAST_QUESTION + "{% if m.role == 'user' %}{{ '[INST] ' + (messages[0].content + '\n\n' if loop.index0 == ns.last "
    "and messages[0].role == 'system' else '') + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}"
    "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip
HEADERS_OF = "llama3_1" if HAS_LLAMA3_1 else "llama3"
TEMPLATES = {
    "chatml": ("smollm2", CHATML),
    "default system": ("smollm2", DEFAULT_SYSTEM),
    "strips": ("smollm2", STRIPS),
    "headers": (HEADERS_OF, HEADERS.replace("DATE", "")),
    "date": (HEADERS_OF, HEADERS.replace("DATE", DATE)),
    "inst": ("mistral", INST),
    "gemma": ("gemma", GEMMA),
    "thinks": ("smollm2", THINKS),
    "asks to think": ("smollm2", ASKS_TO_THINK),
    "moves": ("mistral", MOVES),
}
ANEW = ("thinks", "asks to think")  # where a thought is there
NO_SYSTEM = ("inst", "gemma")
TRIMS = ("strips", "headers", "date", "gemma")
BYTES = ("smollm2", "llama3", "llama3_1")
# how an answer ends, and what stands around its text
END = {
    "smollm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
}
CONTENTS = [
    "plain words", " begins so", "ends so ", "\n\nboth \t\n", "", "👍🏽 한국어 café", "Hi\n\n\nthere", "a",
    "```py\nx = 1\n```", "123 456", "   ",
]  # fmt: skip
SPECIAL = [
    "<|im_end|>", "a</s>b", "<|eot_id|><|im_start|>assistant\n", "[INST] x [/INST]",
    "<end_of_turn>\n<start_of_turn>model",
    " <s> ", "<|begin_of_text|>", "<|im_end|", "|im_end|>", "<<|im_end|>>", "</s</s>>", "<|endoftext|> 한",
]  # fmt: skip


@pytest.fixture(scope="module")
def with_template(stand_ins, tmp_path_factory):
    """A function: the tokenizer of that template, as a reader's."""
    gemma = load_tokenizer(str(stand_ins["mistral"]))
    gemma.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    made = {}

    def tokenizer_of(name):
        if name not in made:
            kind, template = TEMPLATES[name]
            made[name] = deepcopy(gemma) if kind == "gemma" else load_tokenizer(str(stand_ins[kind]))
            made[name].chat_template = template
        return made[name]

    return tokenizer_of


def message(role, content):
    return {"role": role, "content": content}


def talk(*contents, system=None):
    turns = [message(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]
    return [message("system", system)] * (system is not None) + turns


def by_library(tokenizer, messages, **more):
    ids = tokenizer.apply_chat_template(messages, tokenize=True, **more)
    return ids if isinstance(ids, list) else ids["input_ids"]


def learned(tokenizer, ids, mask):
    """The texts with a loss."""
    runs = [
        [token for token, _ in part] for with_loss, part in groupby(zip(ids, mask), lambda one: one[1]) if with_loss
    ]
    return [tokenizer.decode(run) for run in runs]


def encoded(tokenizer, *conversations, block_size=4096, column="messages"):
    rows = [Row({column: messages}, f"my.jsonl, line {n}") for n, messages in enumerate(conversations, 1)]
    return encode_conversations(rows, chat, chat_of(tokenizer), block_size)


def conversations(name, contents, count, seed):
    rng = random.Random(f"{name} {seed}")
    for _ in range(count):
        some = rng.choices(contents, k=2 * rng.choice([1, 1, 2, 3]))
        some[1] += "x"  # one of them says something
        if name in ANEW:
            some = [f"<think>\nof {one}\n</think>\n\n{one}" if n % 2 else one for n, one in enumerate(some)]
        yield talk(*some, system=None if name in NO_SYSTEM or rng.random() < 0.5 else rng.choice(contents))


def same_text(name, one, other):
    """White space at its begin may be of one token with the template's, which carries no loss; and a decoder of
    SentencePiece drops the space before the first word."""
    if TEMPLATES[name][0] in BYTES:
        return one == other or (one == other[-len(one) :] and not other[: -len(one)].strip())
    return one.replace(" ", "").lstrip() == other.replace(" ", "").lstrip()


# ------------------------------------------------------------------------------------------------ ids and loss


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_the_library_and_each_answer_and_its_end_has_a_loss(name, with_template):
    tokenizer = with_template(name)
    kind, _ = TEMPLATES[name]
    for messages in conversations(name, CONTENTS, 150, 1):
        rows, counts = encoded(tokenizer, messages)
        answers = [one["content"] for one in messages if one["role"] == "assistant"]
        moved = name == "moves" and messages[0]["role"] == "system" and len(answers) > 1
        anew = len(answers) > 1 and (name in ANEW or moved)
        if not anew:
            ((ids, mask),) = rows
            assert ids == by_library(tokenizer, messages)
            found = learned(tokenizer, ids, mask)
        else:
            ends = [n for n, one in enumerate(messages, 1) if one["role"] == "assistant"]
            kept = [(end, answer) for end, answer in zip(ends, answers) if answer.strip()]
            assert counts["dropped"] == len(answers) - len(kept)
            assert [ids for ids, _ in rows] == [by_library(tokenizer, messages[:end]) for end, _ in kept]
            found, answers = [one for ids, mask in rows for one in learned(tokenizer, ids, mask)], [a for _, a in kept]
        if name == "asks to think":  # the question begins the thought
            answers = [answer[len("<think>\n") :] for answer in answers]
        wanted = [(one.strip() if name in TRIMS else one) + END[kind] for one in answers]
        assert len(found) == len(wanted) and all(map(same_text, [name] * len(found), found, wanted)), (found, wanted)
        assert counts["conversations"] == 1 and counts["rows"] == len(rows)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_that_looks_like_a_control_token_stays_text(name, with_template):
    tokenizer = with_template(name)
    beneath = tokenizer.backend_tokenizer
    added = beneath.get_added_tokens_decoder().items()
    specials = {number for number, one in added if one.special}
    looks = "|".join(re.escape(one.content) for _, one in added)
    for messages in conversations(name, CONTENTS + SPECIAL * 2, 150, 2):
        plain = [{**one, "content": re.sub(looks, "x", one["content"])} for one in messages]
        for (ids, mask), (others, _) in zip(encoded(tokenizer, messages)[0], encoded(tokenizer, plain)[0]):
            assert [one for one in ids if one in specials] == [one for one in others if one in specials]
            assert sum(mask) and not set(mask) - {0, 1}
    for text in SPECIAL:
        ((ids, mask),) = (
            encoded(tokenizer, talk(text, text + " ", ""))[0][:1]
            if name not in NO_SYSTEM
            else (encoded(tokenizer, talk(text, text))[0])
        )
        (answer,) = learned(tokenizer, ids, mask)
        own = END[TEMPLATES[name][0]]
        assert answer.endswith(own) and same_text(name, answer[: -len(own)].strip(), text.strip())
        if TEMPLATES[name][0] in BYTES:  # pieces between control tokens are tokenized apart
            pieces = [[*part] for special, part in groupby(ids, specials.__contains__) if not special]
            for piece in pieces:
                beneath.encode_special_tokens = True
                assert beneath.encode(tokenizer.decode(piece), add_special_tokens=False).ids == piece
                beneath.encode_special_tokens = False


def trims_offsets(it):
    for one in [it["post_processor"], it["pre_tokenizer"], *it["post_processor"].get("processors", [])]:
        if "trim_offsets" in one:
            one["trim_offsets"] = True


def strips_around(it):
    for one in it["added_tokens"]:
        one["rstrip"] = one["content"] == "<|im_start|>"
        one["lstrip"] = one["content"] == "<|im_end|>"


def holes(it):
    """No id 1599, but a 1601: as many tokens as before."""
    vocabulary = it["model"]["vocab"]
    vocabulary[next(text for text, number in vocabulary.items() if number == 1599)] = 1601


def metaspace(it):
    it.update(normalizer=None)
    it["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def end_is_plain(it):
    for one in it["added_tokens"]:
        one["special"] = one["special"] and one["content"] != "<|im_end|>"


@pytest.mark.parametrize(
    ("kind", "template", "change"),
    [
        ("smollm2", CHATML, trims_offsets),
        ("llama3", HEADERS.replace("DATE", "").replace(" | trim", ""), trims_offsets),
        ("smollm2", CHATML, strips_around),
        ("smollm2", CHATML, holes),
        ("mistral", INST, metaspace),
        ("smollm2", CHATML, end_is_plain),
    ],
)
def test_tokenizers_with_habits_of_their_own(kind, template, change, stand_ins, tmp_path):
    plain = shutil.copytree(stand_ins[kind], tmp_path / "plain")
    settings = json.loads((plain / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["added_tokens_decoder"]  # which would undo the change
    (plain / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = changed(plain, tmp_path, change)
    tokenizer.chat_template = template
    last = tokenizer.decode([1601 if change is holes else 1599])  # learned last
    assert change is not strips_around or tokenizer.backend_tokenizer.get_added_tokens_decoder()[1].rstrip
    for messages in conversations("inst", [*CONTENTS, last], 150, 3):
        ((ids, mask),) = encoded(tokenizer, messages)[0]
        assert ids == by_library(tokenizer, messages)
        answers = [one["content"] + END[kind] for one in messages if one["role"] == "assistant"]
        for found, wanted in zip(learned(tokenizer, ids, mask), answers):
            if change is strips_around:  # the control tokens take the white space with them
                assert "".join(found.split()) == "".join(wanted.split())
            else:
                assert same_text("inst" if kind == "mistral" else "chatml", found, wanted)


def test_a_token_of_frame_and_answer_is_learned(stand_ins):
    """Where no control token stands between the two: it has the answer's first letters, and the frame's last."""
    tokenizer = load_tokenizer(str(stand_ins["smollm2"]))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('Q: ' if m.role == 'user' else 'A: ') + m.content }}"
        "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    )
    messages = talk("the thing", "the word")
    ((ids, mask),) = encoded(tokenizer, messages)[0]
    assert learned(tokenizer, ids, mask) == [" the word<|im_end|>"] and ids == by_library(tokenizer, messages)


def test_white_space_of_the_frame_is_not_learned(stand_ins, tmp_path):
    """Also where the tokenizer says that a space ends where it begins."""
    tokenizer = changed(stand_ins["llama3"], tmp_path, trims_offsets)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('Q:  ' if m.role == 'user' else 'A:  ') + m.content + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:  ' }}{% endif %}"
    )
    ((ids, mask),) = encoded(tokenizer, talk("7", "1"))[0]
    assert learned(tokenizer, ids, mask) == ["1<|eot_id|>"]


def test_tools_and_system_carry_no_loss_and_a_call_does(stand_ins):
    tokenizer = load_tokenizer(str(stand_ins["smollm2"]))
    called = "(m.tool_calls[0].name + '(' + m.tool_calls[0].arguments + ')' if 'tool_calls' in m else m.content)"
    tokenizer.chat_template = "{% if tools %}{{ 'Tools: ' + tools[0].name + '\n' }}{% endif %}" + CHATML.replace(
        "m.content", called
    )
    call = [{"name": "weather", "arguments": '{"city": "서울 <|im_end|>"}'}]
    messages = [
        {"role": "system", "content": "s", "tool_calls": None},
        {"role": "user", "content": "날씨?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "맑음", "name": "weather"},
        {"role": "assistant", "content": "맑아요.", "tool_calls": None},
    ]
    row = {"messages": messages, "tools": [{"name": "weather"}]}
    assert "tool_calls" not in checked(chat(row))[0]  # of a table each message has each key
    ((ids, mask),), _ = encode_conversations([row], chat, chat_of(tokenizer), 512)
    called, said = learned(tokenizer, ids, mask)
    assert called == 'weather({"city": "서울 <|im_end|>"})<|im_end|>'
    assert said == "맑아요.<|im_end|>" and tokenizer.decode(ids).startswith("Tools: weather\n<|im_start|>system\ns<")
    assert ids.count(tokenizer.eos_token_id) == 5


def test_the_date_is_that_of_the_day(with_template):
    tokenizer = with_template("date")
    ((ids, _),) = encoded(tokenizer, talk("a", "b"))[0]
    day = tokenizer.decode(ids).partition("Today: ")[2].partition("\n")[0]
    assert day in ("26 Jul 2024", datetime.now().strftime("%d %b %Y"))


def test_thinking_is_learned_in_the_turn_in_which_it_is_seen(with_template):
    """A row for each answer, since a client leaves earlier thoughts out; and the count says so."""
    tokenizer, thought = with_template("thinks"), "<think>\nhm\n</think>\n\n"
    rows, counts = encoded(tokenizer, talk("a", thought + "b", "c", thought + "d"), talk("a", thought + "b"))
    assert [learned(tokenizer, *row) for row in rows] == [[f"{thought}{one}<|im_end|>"] for one in "bdb"]
    assert tokenizer.decode(rows[1][0]).count("<think>") == 1
    assert (counts["rows"], counts["conversations"]) == (3, 2)
    # nothing is written anew where nothing was thought
    assert encoded(tokenizer, talk("a", "b", "c", "d"))[1]["rows"] == 1


@pytest.mark.parametrize("answer", ["<thing> b", "<think>\nhm\n</think>\n\nb", "b", ""])
def test_a_question_that_begins_more_than_the_answer_does(answer, with_template):
    """An answer that begins as the question's `<think>` does is still learned from its first letter."""
    tokenizer = with_template("asks to think")
    (first, _), (ids, mask) = encoded(tokenizer, talk("a", "x", "b", answer or "x"), talk("a", answer + "y"))[0]
    (found,) = learned(tokenizer, ids, mask)
    thought = "<think>\n" if answer.startswith("<think>\n") else ""
    assert found == (answer + "y").replace(thought, "", 1) + "<|im_end|>"


@pytest.mark.parametrize("name", ["chatml", "default system", "strips", "headers", "thinks"])
@pytest.mark.parametrize("greeting", ["hello", "", "assistant\n"])
def test_a_conversation_that_the_assistant_begins(name, greeting, with_template):
    tokenizer = with_template(name)
    messages = [message("assistant", greeting), *talk("a", "b")]
    ((ids, mask),) = encoded(tokenizer, messages)[0]
    greeting = greeting.strip() if name in TRIMS else greeting
    assert ids == by_library(tokenizer, messages)
    assert learned(tokenizer, ids, mask) == [one + END[TEMPLATES[name][0]] for one in (greeting, "b")]


def test_what_follows_the_last_answer_stays_without_a_loss(with_template):
    messages = talk("a", "b", "c")
    ((ids, mask),) = encoded(with_template("chatml"), messages)[0]
    assert ids == by_library(with_template("chatml"), messages)
    assert learned(with_template("chatml"), ids, mask) == ["b<|im_end|>"]


# ------------------------------------------------------------------------------------------------ the end of a turn


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_token_that_ends_a_turn_is_found(name, with_template):
    tokenizer = with_template(name)
    end = tokenizer.convert_tokens_to_ids(END[TEMPLATES[name][0]])
    assert chat_of(tokenizer).end_of_turn() == end
    assert stop_token_ids({"end_of_turn": end}, tokenizer) == list(dict.fromkeys([end, tokenizer.eos_token_id]))
    assert stop_token_ids({}, tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("end", ["", "\n", "<|no_token|>", "<|im_start|>x"])
def test_answers_that_nothing_ends_are_refused_with_their_row(end, stand_ins):
    tokenizer = load_tokenizer(str(stand_ins["smollm2"]))
    tokenizer.chat_template = CHATML.replace("'<|im_end|>\n'", repr(end))
    with pytest.raises(
        UserError, match=r"^my\.jsonl, line 2: in this conversation the chat template of .* ends no answer"
    ):
        encoded(tokenizer, talk("a", ""), talk("a", "b"))
    with pytest.raises(UserError, match="^The chat template of .* ends no answer with a token"):
        chat_of(tokenizer).end_of_turn()


def test_an_end_that_only_the_last_answer_has_is_learned_with_each(stand_ins):
    tokenizer = load_tokenizer(str(stand_ins["smollm2"]))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + (
        "{{ 'assistant: ' if add_generation_prompt else eos_token }}"
    )
    rows, counts = encoded(tokenizer, talk("a", "b", "c", "d"))
    assert counts["rows"] == 2 and all(row[0][-1] == tokenizer.eos_token_id and row[1][-1] for row in rows)


# ------------------------------------------------------------------------------------------------ too long


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_long_conversation_loses_its_oldest_exchanges(name, with_template):
    tokenizer, system = with_template(name), None if name in NO_SYSTEM else "Be brief."
    thought = "<think>\nwell\n</think>\n\n" if name in ANEW else ""
    texts = [f"{'Question' if n % 2 == 0 else thought + 'Answer'} number {n // 2}!" for n in range(12)]
    messages = talk(*texts, system=system)
    whole = len(by_library(tokenizer, messages))
    for block in range(60, whole, 7):
        rows, counts = encoded(tokenizer, messages, block_size=block)
        ids, mask = rows[-1]
        kept = next(n for n in range(6) if len(by_library(tokenizer, talk(*texts[2 * n :], system=system))) <= block)
        assert ids == by_library(tokenizer, talk(*texts[2 * kept :], system=system)) and len(ids) <= block
        assert counts["prompts cut"] >= 1 and not counts["answers cut"]
        assert len(learned(tokenizer, ids, mask)) == (6 - kept if len(rows) == 1 else 1)
        assert all(len(ids) <= block for ids, _ in rows)


def test_then_the_text_of_the_question_is_cut_and_last_the_answer(with_template):
    tokenizer = with_template("headers")
    messages = talk("old", "older", "word " * 200, "The answer stays whole.", system="Be brief.")
    answer = learned(tokenizer, *encoded(tokenizer, messages)[0][0])[-1]
    least = len(by_library(tokenizer, talk("", "The answer stays whole.", system="Be brief.")))
    for block in (least + 50, least + 1, least):
        ((ids, mask),), counts = encoded(tokenizer, messages, block_size=block)
        assert block - 1 <= len(ids) <= block and learned(tokenizer, ids, mask) == [answer]
        assert "Be brief." in tokenizer.decode(ids) and "old" not in tokenizer.decode(ids)
        assert counts["prompts cut"] == 1 and not counts["answers cut"]
    for block in (least - 1, least - 4):
        ((ids, mask),), counts = encoded(tokenizer, messages, block_size=block)
        (cut,) = learned(tokenizer, ids, mask)
        assert len(ids) == block and cut.endswith("<|eot_id|>") and answer.startswith(cut[: -len("<|eot_id|>")])
        assert (counts["prompts cut"], counts["answers cut"]) == (1, 1)
    with pytest.raises(UserError, match=r"^my\.jsonl, line 1: a block of 20 tokens has no room for an answer"):
        encoded(tokenizer, messages, block_size=20)


def test_questions_one_after_the_other_go_together(with_template):
    tokenizer = with_template("chatml")
    messages = [*talk("a", "b"), message("user", "first half"), *talk("second half of all that is asked", "c")]
    whole = len(by_library(tokenizer, messages))
    for block in (whole - 1, len(by_library(tokenizer, messages[2:]))):
        ((ids, _),), _ = encoded(tokenizer, messages, block_size=block)
        assert ids == by_library(tokenizer, messages[2:])
    ((ids, _),), _ = encoded(tokenizer, messages, block_size=len(ids) - 1)
    assert "first half" in tokenizer.decode(ids) and "second half of" in tokenizer.decode(ids)


def test_long_results_of_tools_are_cut_before_the_question(with_template):
    tokenizer = with_template("chatml")
    messages = [
        *talk("old", "older"),
        message("user", "What is in it?"),
        message("assistant", "look"),
        message("tool", "line " * 300),
        message("assistant", "Lines."),
    ]
    ((ids, mask),), counts = encoded(tokenizer, messages, block_size=120)
    text = tokenizer.decode(ids)
    assert 110 < len(ids) <= 120 and "What is in it?" in text and "line line" in text and "old" not in text
    assert learned(tokenizer, ids, mask) == ["look<|im_end|>", "Lines.<|im_end|>"]


def test_questions_behind_the_last_answer_go_first(with_template):
    messages = talk("a", "b", "word " * 100)
    ((ids, _),), counts = encoded(with_template("chatml"), messages, block_size=40)
    assert ids == by_library(with_template("chatml"), messages[:2]) and counts["prompts cut"] == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_question_has_the_ids_of_the_training(name, with_template):
    tokenizer = with_template(name)
    for messages in conversations(name, CONTENTS + SPECIAL, 40, 4):
        *before, _ = messages[: 3 if messages[0]["role"] == "system" else 2]
        (ids, mask), *_ = encoded(tokenizer, [*before, message("assistant", "Yes.")])[0]
        asked = encode_question(chat_of(tokenizer), before, None, 4096)
        start = mask.index(1)
        assert asked[:start] == ids[:start]
        assert len(asked) == start or name in ("asks to think", "inst", "moves")
    asked = talk("old " * 9, "b", "old " * 9, "b", "new " * 60)
    whole = len(encode_question(chat_of(tokenizer), asked, None, 4096))
    for limit, exchanges in ((whole, 2), (whole - 1, 1), (55, 0)):
        ids = encode_question(chat_of(tokenizer), asked, None, limit)
        assert len(ids) <= limit and tokenizer.decode(ids).count("old") == 9 * exchanges
        assert (tokenizer.decode(ids).count("new") == 60) == (exchanges > 0)


# ------------------------------------------------------------------------------------------------ rows as they come


def test_sharegpt_and_other_forms_are_the_same_messages(with_template):
    tokenizer = with_template("chatml")
    ours = talk("a", "b", "c", "d", system="s")
    names = {"user": "human", "assistant": "gpt"}
    theirs = [{"from": names.get(one["role"], one["role"]), "value": one["content"]} for one in ours]
    columns = {key: [one[key] for one in ours] for key in ("role", "content")}
    expected = encoded(tokenizer, ours)
    for messages, column in (
        (theirs, "conversations"),
        (theirs, "messages"),
        (ours, "conversations"),
        (columns, "messages"),
    ):
        assert encoded(tokenizer, messages, column=column) == expected
    with_weight = [{**one, "weight": 1, "name": None} for one in theirs]
    assert encoded(tokenizer, with_weight, column="conversations") == expected
    for row in ({"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "output": "b"}):
        assert encode_conversations([row], chat, chat_of(tokenizer), 64) == encoded(tokenizer, talk("a", "b"))
    row = {"instruction": "a", "input": "x", "output": "b"}
    assert encode_conversations([row], chat, chat_of(tokenizer), 64) == encoded(tokenizer, talk("a\n\nx", "b"))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (
            [message("bot", "a")],
            "message 1 has the role 'bot'. There are system, developer, user, assistant and tool, and",
        ),
        ([message("user", "a"), message("User", "b")], "message 2 has the role 'User'"),
        ([message(None, "a")], "message 1 has the role 'None'"),
        ([message(["user"], "a")], r"message 1 has the role \"\['user'\]\""),
        (
            [message("user", [{"type": "text", "text": "a"}])],
            "the content of message 1 is a list of parts. Make it one",
        ),
        ([message("user", {"text": "a"})], "the content of message 1 is an object"),
        ([{"from": "human", "value": ["a"]}], "the value of message 1 is a list of parts"),
        ([{"role": "user"}], "message 1 has no 'content', it has: role"),
        ([{"from": "human", "content": "a"}], "message 1 has no 'value', it has: from, content"),
        ([{"text": "a"}], "message 1 has no 'role', it has: text"),
        (["a", "b"], "message 1 is text, not an object"),
        ("[{}]", "its messages are text, not a list. Save the data as JSON lines"),
        ({"role": "user"}, "its messages are an object, not a list"),
        (3, "its messages are a int, not a list"),
    ],
)
def test_messages_that_are_none_are_said_with_their_row(messages, said, with_template):
    with pytest.raises(UserError, match=rf"^my\.jsonl, line 2: {said}") as caught:
        encoded(with_template("chatml"), talk("a", "b"), messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "messages", [[], None, "", talk("a"), talk("a", ""), talk("a", " \n"), talk("a", None), talk(system="s")]
)
def test_conversations_without_an_answer_are_dropped_and_counted(messages, with_template):
    rows, counts = encoded(with_template("chatml"), messages, talk("a", "b"))
    assert len(rows) == counts["rows"] == counts["conversations"] == 1 and counts["dropped"] == 1
    assert encoded(with_template("chatml"), messages) == ([], {"rows": 0, "conversations": 0, "dropped": 1})


def test_what_a_template_refuses_is_said_in_its_words(with_template):
    twice = [message("user", "a"), *talk("a", "b")]
    assert len(encoded(with_template("chatml"), twice)[0]) == 1  # this one takes it
    with pytest.raises(
        UserError, match=r"^my\.jsonl, line 1: the chat template of .* refuses it: Roles must alternate .*!\. Mend"
    ):
        encoded(with_template("inst"), twice)
    with pytest.raises(
        UserError, match=r"refuses it: System role not supported\. It takes no system message: put that"
    ):
        encoded(with_template("gemma"), talk("a", "b", system="s"))


def test_half_an_emoji_and_numbers_are_text(with_template):
    ((ids, mask),) = encoded(with_template("chatml"), talk(3, "b\ud83d"))[0]
    assert with_template("chatml").decode(ids).startswith("<|im_start|>user\n3<") and learned(
        with_template("chatml"), ids, mask
    ) == ["b?<|im_end|>"]


def test_a_base_model_has_no_template(stand_ins):
    with pytest.raises(UserError, match=r"has no chat template.*base model\. Take the Instruct or Chat model"):
        Chat(load_tokenizer(str(stand_ins["llama2"])))


def test_a_template_in_a_file_of_its_own(tmp_path):
    write_tiny("smollm2", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    assert encoded(load_tokenizer(str(tmp_path)), talk("a", "b"))[1]["rows"] == 1
