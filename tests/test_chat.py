"""Conversations by the chat template of the model's own tokenizer: its ids, and a loss on the answers alone."""

from __future__ import annotations

import json
import random
import re
import shutil
from copy import deepcopy
from itertools import groupby

import pytest

from common.chat_template import encode_conversation, encode_question, get_chat_template
from common.dataset_file import stop_token_ids
from common.support.exit import UserError
from common.tokenization import last_ids, load_tokenizer
from dataset.messages import read_messages, read_tools
from dataset.templates import chat
from model.tiny import write_tiny
from tests.helpers import HAS_LLAMA3_1

# Templates of our own in the forms of the models', and the tokenizer's kind
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURNS = "{{ '<|im_start|>' + m.role + '\n' + CONTENT + '<|im_end|>\n' }}"
CHATML = "{% for m in messages %}" + TURNS.replace("CONTENT", "m.content") + "{% endfor %}" + ASK
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
STRIPS = CHATML.replace("m.content", "(m.content | trim)")
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
    "m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
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
R1 = (  # in the form of R1's distilled models: no thought is written, no system text and no tools
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
MISTRAL_V3 = (  # the system text stands before the last message alone
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + (messages[0].content + '\n\n' if "
    "loop.last and messages[0].role == 'system' else '') + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}"
    "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
HARMONY = (  # in the form of gpt-oss's: a thought before a call is gone where an answer follows on the call
    "{% for m in messages %}{% if m.role != 'assistant' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% else %}"
    "{% if m.thinking and loop.last or (m.tool_calls and messages[-1].role != 'assistant') %}"
    "{{ '<|im_start|>assistant analysis\n' + m.thinking }}{% endif %}"
    "{% if m.tool_calls %}{{ '<|im_start|>assistant to=' + m.tool_calls[0].function.name + '<|endoftext|>' }}"
    "{% else %}{{ '<|im_start|>assistant final\n' + m.content + '<|im_end|>' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
HEADERS_OF = "llama3_1" if HAS_LLAMA3_1 else "llama3"
TEMPLATES = {
    "chatml": ("smollm2", CHATML),
    "default system": ("smollm2", DEFAULT_SYSTEM),
    "strips": ("smollm2", STRIPS),
    "headers": (HEADERS_OF, HEADERS),
    "inst": ("mistral", INST),
    "gemma": ("gemma", GEMMA),
    "thinks": ("smollm2", THINKS),
    "asks to think": ("smollm2", ASKS_TO_THINK),
    "moves": ("mistral", MOVES),
}
REWRITES = ("thinks", "asks to think")  # where a thought is there
NO_SYSTEM = ("inst", "gemma")
TRIMS = ("strips", "headers", "gemma")
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
    "```py\nx = 1\n```", "123 456", "   ", "<|im_end|", "[INST] x [/INST]",
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


def learned(tokenizer, encoded):
    """The texts in the loss."""
    tokens = zip(encoded.ids, encoded.mask)
    runs = [[token for token, _ in run] for in_loss, run in groupby(tokens, lambda pair: pair[1]) if in_loss]
    return [tokenizer.decode(run) for run in runs]


def encode_row(tokenizer, row, block_size=4096):
    conversation = chat(row)
    messages, tools = read_messages(conversation), read_tools(conversation)
    return encode_conversation(get_chat_template(tokenizer), messages, tools, block_size)


def encode(tokenizer, messages, block_size=4096):
    return encode_row(tokenizer, {"messages": messages}, block_size)


def conversations(name, contents, count, seed):
    rng = random.Random(f"{name} {seed}")
    for _ in range(count):
        some = rng.choices(contents, k=2 * rng.choice([1, 1, 2, 3]))
        some[-1] += "x"  # what follows the last answer with content is left out
        if name in REWRITES:
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
def test_ids_are_those_of_the_library_and_each_answer_and_its_end_is_in_the_loss(name, with_template):
    tokenizer = with_template(name)
    kind, _ = TEMPLATES[name]
    for messages in conversations(name, CONTENTS, 150, 1):
        rows = encode(tokenizer, messages)
        answers = [one["content"] for one in messages if one["role"] == "assistant"]
        moved = name == "moves" and messages[0]["role"] == "system"
        if len(answers) > 1 and (name in REWRITES or moved):
            ends = [number for number, one in enumerate(messages, 1) if one["role"] == "assistant"]
            kept = [(end, answer) for end, answer in zip(ends, answers) if answer.strip()]
            assert [row.ids for row in rows] == [by_library(tokenizer, messages[:end]) for end, _ in kept]
            answers = [answer for _, answer in kept]
        else:
            assert [row.ids for row in rows] == [by_library(tokenizer, messages)]
        found = [text for row in rows for text in learned(tokenizer, row)]
        if name == "asks to think":  # the question begins the thought
            answers = [answer[len("<think>\n") :] for answer in answers]
        wanted = [(one.strip() if name in TRIMS else one) + END[kind] for one in answers]
        assert len(found) == len(wanted) and all(map(same_text, [name] * len(found), found, wanted)), (found, wanted)
        assert not any(row.prompt_truncated or row.answer_truncated or row.remarks for row in rows)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_control_token_in_any_text_is_found_and_a_question_with_one_refused(name, with_template):
    template, end = get_chat_template(with_template(name)), END[TEMPLATES[name][0]]
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": [f"b{end}"]}}]}
    for messages, tools in (
        (talk(f"a{end}b"), None),
        (talk("a", end, "b"), None),
        (talk("a", system=f"a\n\n{end}"), None),
        ([call, *talk("a")], None),
        (talk("a"), [{"parameters": {end: {"type": "string"}}}]),
    ):
        assert template.find_control_token(messages, tools) == end
        said = f"^the text contains the control token {re.escape(end)}, .*Remove it from the text.$"
        with pytest.raises(UserError, match=said):
            encode_question(template, messages, tools, 4096)
    for text in (*CONTENTS, end[1:], end[:-1], " ".join(end)):
        assert template.find_control_token(talk("a", text), [{"name": text}]) is None


def test_a_control_token_that_is_one_when_normalized_is_found(stand_ins, tmp_path):
    tokenizer = changed(stand_ins["smollm2"], tmp_path, normalized)
    tokenizer.chat_template = CHATML
    asked = talk("a<|IM_END|>")
    assert by_library(tokenizer, asked).count(tokenizer.eos_token_id) == 2
    assert get_chat_template(tokenizer).find_control_token(asked) == "<|im_end|>"
    assert get_chat_template(tokenizer).find_control_token(talk("A B"), [{"name": "<|Im_Start|>"}]) == "<|im_start|>"
    assert not get_chat_template(tokenizer).find_control_token(talk("<|IM_END|"))


def test_a_control_token_with_a_quote_is_found(stand_ins):
    tokenizer = load_tokenizer(str(stand_ins["smollm2"]))
    tokenizer.add_special_tokens({"additional_special_tokens": ['<|"|>']})
    tokenizer.chat_template = CHATML
    assert get_chat_template(tokenizer).find_control_token(talk('a<|"|>'))
    assert not get_chat_template(tokenizer).find_control_token(talk('a<|\\"|>'))


def changed(directory, tmp_path, change):
    """The tokenizer of `directory` after `change` of its tokenizer.json."""
    folder = shutil.copytree(directory, tmp_path / "changed")
    (folder / "tokenizer.model").unlink(missing_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("added_tokens_decoder", None)  # which would undo the change
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(str(folder))


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


def normalized(it):
    """Control tokens are looked for in the normalized text, where capital letters are small ones."""
    it["normalizer"] = {"type": "Lowercase"}
    for one in it["added_tokens"]:
        one["normalized"] = True


def end_is_plain(it):
    for one in it["added_tokens"]:
        one["special"] = one["special"] and one["content"] != "<|im_end|>"


@pytest.mark.parametrize(
    ("kind", "template", "change"),
    [
        ("smollm2", CHATML, trims_offsets),
        ("llama3", HEADERS.replace(" | trim", ""), trims_offsets),
        ("smollm2", CHATML, strips_around),
        ("smollm2", CHATML, holes),
        ("mistral", INST, metaspace),
        ("smollm2", CHATML, end_is_plain),
        ("smollm2", CHATML, normalized),
    ],
)
def test_tokenizers_with_habits_of_their_own(kind, template, change, stand_ins, tmp_path):
    tokenizer = changed(stand_ins[kind], tmp_path, change)
    tokenizer.chat_template = template
    last = tokenizer.decode([1601 if change is holes else 1599])  # learned last
    assert change is not strips_around or tokenizer.backend_tokenizer.get_added_tokens_decoder()[1].rstrip
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    assert change is not normalized or all(token.normalized for token in added)
    for messages in conversations("inst", [*CONTENTS, last], 150, 3):
        (row,) = encode(tokenizer, messages)
        assert row.ids == by_library(tokenizer, messages)
        answers = [one["content"] + END[kind] for one in messages if one["role"] == "assistant"]
        for found, wanted in zip(learned(tokenizer, row), answers):
            wanted = wanted.lower() if change is normalized else wanted
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
    (row,) = encode(tokenizer, messages)
    assert learned(tokenizer, row) == [" the word<|im_end|>"] and row.ids == by_library(tokenizer, messages)


def test_white_space_of_the_frame_is_not_learned(stand_ins, tmp_path):
    """Also where the tokenizer says that a space ends where it begins."""
    tokenizer = changed(stand_ins["llama3"], tmp_path, trims_offsets)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('Q:  ' if m.role == 'user' else 'A:  ') + m.content + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:  ' }}{% endif %}"
    )
    (row,) = encode(tokenizer, talk("7", "1"))
    assert learned(tokenizer, row) == ["1<|eot_id|>"]


def test_tools_and_system_carry_no_loss_and_a_call_does(stand_ins):
    tokenizer = load_tokenizer(str(stand_ins["smollm2"]))
    called = "(m.tool_calls[0].name + '(' + m.tool_calls[0].arguments + ')' if 'tool_calls' in m else m.content)"
    tokenizer.chat_template = "{% if tools %}{{ 'Tools: ' + tools[0].name + '\n' }}{% endif %}" + CHATML.replace(
        "m.content", called
    )
    call = [{"name": "weather", "arguments": '{"city": "서울"}'}]
    messages = [
        {"role": "system", "content": "s", "tool_calls": None},
        {"role": "user", "content": "날씨?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "맑음", "name": "weather"},
        {"role": "assistant", "content": "맑아요.", "tool_calls": None},
    ]
    row = {"messages": messages, "tools": [{"name": "weather"}]}
    assert "tool_calls" not in read_messages(chat(row))[0]  # a table gives each message each key
    (made,) = encode_row(tokenizer, row)
    called, said = learned(tokenizer, made)
    assert called == 'weather({"city": "서울"})<|im_end|>'
    assert said == "맑아요.<|im_end|>" and tokenizer.decode(made.ids).startswith(
        "Tools: weather\n<|im_start|>system\ns<"
    )
    assert made.ids.count(tokenizer.eos_token_id) == 5


def test_thinking_is_learned_in_the_turn_in_which_it_is_seen(with_template):
    """A row for each answer, since a client leaves earlier thoughts out."""
    tokenizer, thought = with_template("thinks"), "<think>\nhm\n</think>\n\n"
    rows = encode(tokenizer, talk("a", thought + "b", "c", thought + "d"))
    assert [learned(tokenizer, row) for row in rows] == [[f"{thought}{one}<|im_end|>"] for one in "bd"]
    assert tokenizer.decode(rows[1].ids).count("<think>") == 1
    assert len(encode(tokenizer, talk("a", "b", "c", "d"))) == 1  # nothing was thought, nothing is rewritten
    messages = talk("a", thought + "b", "c")  # with the next question, the thought is gone
    (row,) = encode(tokenizer, messages)
    assert row.ids == by_library(tokenizer, messages[:2]) and learned(tokenizer, row) == [f"{thought}b<|im_end|>"]


@pytest.mark.parametrize("template", [ASKS_TO_THINK, R1])
def test_a_question_that_begins_more_than_the_answer_does(template, stand_ins):
    """The ids before an answer are those with which the model is asked, and all of the answer is learned."""
    tokenizer = load_tokenizer(str(stand_ins["smollm2"]))
    tokenizer.chat_template = template
    for answer in ("1", "a", "b", "assistant", "<b>bold</b>", "<th", "<think>", "user\n", "한"):
        for messages in (talk("a", answer), talk("a", "b", "<think>", answer)):
            *_, row = encode(tokenizer, messages)
            asked = by_library(tokenizer, messages[:-1], add_generation_prompt=True)
            assert row.ids[: row.mask.index(1)] == asked
            assert learned(tokenizer, row) == [f"{answer}<|im_end|>"]


def test_a_system_text_that_only_the_newest_question_has_is_learned_with_each(stand_ins):
    tokenizer = load_tokenizer(str(stand_ins["mistral"]))
    tokenizer.chat_template = MISTRAL_V3
    messages = talk("a", "b", "[INST] a", "[/INST] d", system="Be brief.")
    rows = encode(tokenizer, messages)
    assert [tokenizer.decode(row.ids) for row in rows] == [
        "<s> [INST] Be brief.\n\na[/INST] b</s>",
        "<s> [INST] a[/INST] b</s> [INST] Be brief.\n\n[INST] a[/INST] [/INST] d</s>",
    ]
    for row, end in zip(rows, (2, 4)):
        assert row.ids[: row.mask.index(1)] == by_library(tokenizer, messages[:end], add_generation_prompt=True)


def test_calls_with_an_end_and_a_header_of_their_own(stand_ins):
    tokenizer = load_tokenizer(str(stand_ins["smollm2"]))
    tokenizer.chat_template = HARMONY
    call = {**message("assistant", ""), "thinking": "hm", "tool_calls": [{"function": {"name": "f"}}]}
    messages = [message("user", "a"), call, message("tool", "1"), {**message("assistant", "b"), "thinking": "so"}]
    rows = encode(tokenizer, [*messages, message("user", "c"), call])
    for row, end in zip(rows, (1, 3, 5)):
        asked = by_library(tokenizer, [*messages, message("user", "c")][:end], add_generation_prompt=True)
        assert row.ids[: row.mask.index(1)] == asked
    called = " analysis\nhm<|im_start|>assistant to=f<|endoftext|>"
    answered = " analysis\nso<|im_start|>assistant final\nb<|im_end|>"
    assert [learned(tokenizer, row) for row in rows] == [[called], [answered], [called]]
    assert last_ids(rows[0].ids, rows[0].mask) == {0} and last_ids(rows[1].ids, rows[1].mask) == {2}


def test_an_answer_that_the_template_writes_otherwise_than_it_asks_is_refused(stand_ins):
    """It asks for an answer without a thought, and this one has one."""
    tokenizer = load_tokenizer(str(stand_ins["smollm2"]))
    parts = "m.content.split('</think>')[0] + '</think>\n\n' + m.content.split('</think>')[1]"
    written = f"('<think>\n\n</think>\n\n' + m.content if '</think>' not in m.content else {parts})"
    asks = ASK.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
    tokenizer.chat_template = CHATML.replace("m.content", f"(m.content if m.role == 'user' else {written})")
    tokenizer.chat_template = tokenizer.chat_template.replace(ASK, asks)
    (row,) = encode(tokenizer, talk("a", "b"))
    assert learned(tokenizer, row) == ["b<|im_end|>"]
    with pytest.raises(UserError, match="writes message 2 in another form than it asks in, so the model would"):
        encode(tokenizer, talk("a", "<think>\nhm\n</think>b"))


@pytest.mark.parametrize("name", ["chatml", "default system", "strips", "headers", "thinks"])
@pytest.mark.parametrize("greeting", ["hello", "", "assistant\n"])
def test_a_conversation_that_the_assistant_begins(name, greeting, with_template):
    tokenizer = with_template(name)
    messages = [message("assistant", greeting), *talk("a", "b")]
    (row,) = encode(tokenizer, messages)
    greeting = greeting.strip() if name in TRIMS else greeting
    assert row.ids == by_library(tokenizer, messages)
    assert learned(tokenizer, row) == [one + END[TEMPLATES[name][0]] for one in (greeting, "b")]


@pytest.mark.parametrize("more", [talk("c"), talk("c", " \n"), [message("assistant", "")]])
def test_what_follows_the_last_answer_is_left_out(more, with_template):
    (row,) = encode(with_template("chatml"), [*talk("a", "b"), *more])
    assert row.ids == by_library(with_template("chatml"), talk("a", "b")) and not row.prompt_truncated
    assert learned(with_template("chatml"), row) == ["b<|im_end|>"]


# ------------------------------------------------------------------------------------------------ the end of a turn


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_token_that_ends_a_turn_is_found(name, with_template):
    tokenizer = with_template(name)
    end = tokenizer.convert_tokens_to_ids(END[TEMPLATES[name][0]])
    assert get_chat_template(tokenizer).end_of_turn() == end
    assert stop_token_ids({"end_tokens": [end]}, tokenizer) == list(dict.fromkeys([end, tokenizer.eos_token_id]))
    assert stop_token_ids({}, tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("end", ["", "\n", "<|no_token|>", "<|im_start|>x"])
def test_answers_that_nothing_ends_are_refused(end, stand_ins):
    tokenizer = load_tokenizer(str(stand_ins["smollm2"]))
    tokenizer.chat_template = CHATML.replace("'<|im_end|>\n'", repr(end))
    with pytest.raises(UserError, match="^in this conversation the chat template of .* ends no answer"):
        encode(tokenizer, talk("a", "b"))
    with pytest.raises(UserError, match="^The chat template of .* ends no answer with a token"):
        get_chat_template(tokenizer).end_of_turn()


def test_a_turn_that_the_next_turn_s_token_ends_is_refused_in_these_words(stand_ins):
    """GLM-4's form."""
    tokenizer = load_tokenizer(str(stand_ins["smollm2"]))
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "")
    with pytest.raises(
        UserError, match=r"ends no answer with a token of its own: <\|im_start\|> of the next turn does"
    ):
        get_chat_template(tokenizer).end_of_turn()


def test_an_end_that_only_the_last_answer_has_is_learned_with_each(stand_ins):
    tokenizer = load_tokenizer(str(stand_ins["smollm2"]))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + (
        "{{ 'assistant: ' if add_generation_prompt else eos_token }}"
    )
    rows = encode(tokenizer, talk("a", "b", "c", "d"))
    assert len(rows) == 2 and all(row.ids[-1] == tokenizer.eos_token_id and row.mask[-1] for row in rows)


# ------------------------------------------------------------------------------------------------ too long


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_long_conversation_loses_its_oldest_exchanges(name, with_template):
    tokenizer, system = with_template(name), None if name in NO_SYSTEM else "Be brief."
    thought = "<think>\nwell\n</think>\n\n" if name in REWRITES else ""
    texts = [f"{'Question' if n % 2 == 0 else thought + 'Answer'} number {n // 2}!" for n in range(12)]
    messages = talk(*texts, system=system)
    full = len(by_library(tokenizer, messages))
    for block in range(60, full, 7):
        rows = encode(tokenizer, messages, block)
        kept = next(n for n in range(6) if len(by_library(tokenizer, talk(*texts[2 * n :], system=system))) <= block)
        assert rows[-1].ids == by_library(tokenizer, talk(*texts[2 * kept :], system=system))
        assert rows[-1].prompt_truncated and not rows[-1].answer_truncated
        assert len(learned(tokenizer, rows[-1])) == (6 - kept if len(rows) == 1 else 1)
        assert all(len(row.ids) <= block for row in rows)


def test_then_the_text_of_the_question_is_truncated_and_last_the_answer(with_template):
    tokenizer = with_template("headers")
    messages = talk("old", "older", "word " * 200, "The answer stays whole.", system="Be brief.")
    answer = learned(tokenizer, *encode(tokenizer, messages))[-1]
    least = len(by_library(tokenizer, talk("", "The answer stays whole.", system="Be brief.")))
    for block in (least + 50, least + 1, least):
        (row,) = encode(tokenizer, messages, block)
        text = tokenizer.decode(row.ids)
        assert block - 1 <= len(row.ids) <= block and learned(tokenizer, row) == [answer]
        assert "Be brief." in text and "old" not in text
        assert row.prompt_truncated and not row.answer_truncated
    for block in (least - 1, least - 4):
        (row,) = encode(tokenizer, messages, block)
        (start,) = learned(tokenizer, row)
        assert len(row.ids) == block and start.endswith("<|eot_id|>")
        assert answer.startswith(start[: -len("<|eot_id|>")]) and row.prompt_truncated and row.answer_truncated
    with pytest.raises(UserError, match=r"^--block-size 20 leaves no room for an answer: "):
        encode(tokenizer, messages, 20)


def test_questions_one_after_the_other_go_together(with_template):
    tokenizer = with_template("chatml")
    messages = [*talk("a", "b"), message("user", "first half"), *talk("second half of all that is asked", "c")]
    least = len(by_library(tokenizer, messages[2:]))
    for block in (len(by_library(tokenizer, messages)) - 1, least):
        (row,) = encode(tokenizer, messages, block)
        assert row.ids == by_library(tokenizer, messages[2:])
    (row,) = encode(tokenizer, messages, least - 1)
    assert "first half" in tokenizer.decode(row.ids) and "second half of" in tokenizer.decode(row.ids)


def test_long_results_of_tools_are_truncated_before_the_question(with_template):
    tokenizer = with_template("chatml")
    turns = ["user", "assistant", "user", "assistant", "tool", "assistant"]
    texts = ["old", "older", "What is in it?", "look", "line " * 300, "Lines."]
    (row,) = encode(tokenizer, list(map(message, turns, texts)), 120)
    text = tokenizer.decode(row.ids)
    assert 110 < len(row.ids) <= 120 and "What is in it?" in text and "line line" in text and "old" not in text
    assert learned(tokenizer, row) == ["look<|im_end|>", "Lines.<|im_end|>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_question_has_the_ids_of_the_training(name, with_template):
    tokenizer = with_template(name)
    template = get_chat_template(tokenizer)
    for messages in conversations(name, CONTENTS, 40, 4):
        before = messages[: 2 if messages[0]["role"] == "system" else 1]
        row, *_ = encode(tokenizer, [*before, message("assistant", "Yes.")])
        asked = encode_question(template, before, None, 4096)
        start = row.mask.index(1)
        assert asked == row.ids[:start]
    asked = talk("old " * 9, "b", "old " * 9, "b", "new " * 60)
    full = len(encode_question(template, asked, None, 4096))
    for limit, exchanges in ((full, 2), (full - 1, 1), (55, 0)):
        ids = encode_question(template, asked, None, limit)
        assert len(ids) <= limit and tokenizer.decode(ids).count("old") == 9 * exchanges
        assert (tokenizer.decode(ids).count("new") == 60) == (exchanges > 0)


# ------------------------------------------------------------------------------------------------ rows as they come


def test_sharegpt_and_other_forms_are_the_same_messages():
    ours = talk("a", "b", "c", "d", system="s")
    names = {"user": "human", "assistant": "gpt"}
    theirs = [{"from": names.get(one["role"], one["role"]), "value": one["content"]} for one in ours]
    columns = {key: [one[key] for one in ours] for key in ("role", "content")}
    for row in (
        {"conversations": theirs},
        {"messages": theirs},
        {"conversations": ours},
        {"messages": ours, "conversations": []},
        {"messages": columns},
        {"conversations": [{**one, "name": None} for one in theirs]},
    ):
        assert read_messages(chat(row)) == ours
    assert read_messages(chat({"instruction": "a", "output": "b"})) == talk("a", "b")
    assert read_messages(chat({"instruction": "a", "input": " ", "output": "b"})) == talk("a", "b")
    assert read_messages(chat({"instruction": "a", "input": "x", "output": "b"})) == talk("a\n\nx", "b")
    assert read_messages(chat({"messages": talk(3, "b\ud83d")})) == talk("3", "b?")  # half of an emoji


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([message("bot", "a")], "message 1 has the role 'bot'. Rename it to one of: system, developer, user, ass"),
        ([message("user", "a"), message("User", "b")], "message 2 has the role 'User'"),
        ([message(None, "a")], "message 1 has the role 'None'"),
        ([message(["user"], "a")], r"message 1 has the role \"\['user'\]\""),
        ([message("user", [{"type": "text", "text": "a"}])], "the content of message 1 is a list of parts. Make it"),
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
def test_messages_that_are_none(messages, said):
    with pytest.raises(UserError, match=f"^{said}") as caught:
        read_messages(chat({"messages": messages}))
    assert "\n" not in str(caught.value)


def test_tools_that_are_no_list():
    assert read_tools(chat({"messages": [], "tools": None})) is None
    with pytest.raises(UserError, match="^its tools are text, not a list of JSON schemas"):
        read_tools(chat({"messages": talk("a"), "tools": "weather"}))


@pytest.mark.parametrize(
    "messages", [[], None, "", talk("a"), talk("a", ""), talk("a", " \n"), talk("a", None), talk(system="s")]
)
def test_conversations_without_an_answer_give_nothing(messages, with_template):
    assert encode(with_template("chatml"), messages) == []


def test_what_a_template_refuses_is_said_in_its_words(with_template):
    twice = [message("user", "a"), *talk("a", "b")]
    assert len(encode(with_template("chatml"), twice)) == 1  # this one takes it
    with pytest.raises(
        UserError, match=r"^the chat template of .* refuses it: Roles must alternate .*!\. Fix that row"
    ):
        encode(with_template("inst"), twice)
    with pytest.raises(UserError, match=r"refuses it: System role not supported\. If it takes no system message, put"):
        encode(with_template("gemma"), talk("a", "b", system="s"))


def test_a_base_model_has_no_template(stand_ins):
    with pytest.raises(UserError, match=r"has no chat template.*base model\. Use the Instruct or Chat model"):
        get_chat_template(load_tokenizer(str(stand_ins["llama2"])))


def test_a_template_in_a_file_of_its_own(tmp_path):
    write_tiny("smollm2", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    assert len(encode(load_tokenizer(str(tmp_path)), talk("a", "b"))) == 1
