"""The chat template of a model that has learned blocks (`### Instruction:` ...): their form in Jinja, the language of
such templates (https://huggingface.co/docs/transformers/chat_templating), made of the template function itself.

Chat clients and servers ask a model by the template in its tokenizer. With this one they ask as it has learned: a
question alone gives the very token ids of the training's prompt, bos included. What looks like a special token in a
message is one for them, as with every chat template: only our own scripts keep it text.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from copy import deepcopy
from typing import Callable, List, Optional

from common.support.exit import UserError
from common.text import cell
from common.tokenization import Example, encode_prompt
from common.words import ID, as_list, words_of

MARK = "Xq7WZk3vXq7"  # stands for the user's text
QUESTIONS = [  # by which the ids are compared
    "a", "What is 12 + 34?\n\n- one\n- two", "비 오는 날 집에서 할 수 있는 일을 세 가지 추천해 주세요.",
    "{{ x }} {% if a %} # naïve 👍", "def f(x):\n    return  x\n",
]  # fmt: skip
# Each turn is a whole row of the training, bos to end token, as in Llama 2's own template: the model has seen no other
# form, and without the earlier turns a "Why?" would be asked of nobody. A system text goes before the next question, in
# its place, as in Gemma 3's: such a model was told there what to do.
JINJA = """\
{%- set told = namespace(system="") %}
{%- for message in messages %}
    {%- if message["role"] in ["system", "developer"] %}
        {%- set told.system = told.system + message["content"] + "\\n\\n" %}
    {%- elif message["role"] == "user" %}
        {%- set text = (told.system + message["content"])TRIM %}
        {%- set told.system = "" %}
        {{- QUESTION }}
    {%- elif message["role"] == "assistant" %}
        {{- ANSWER + message["content"] + END }}
    {%- else %}
        {{- raise_exception("This model has learned questions and answers alone, no messages of " + message["role"]) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ANSWER }}
{%- endif %}
"""


def chat_of_blocks(template: Callable[[dict], Example], row: dict, tokenizer) -> str:
    """The chat template, Jinja, that asks in the form of `template`; `row` is one of those that it takes.

    UserError where there is none: the template puts together several texts, and a message is one; or does more with the
    text than a chat template can; or its frame has what the tokenizer takes for a special token.
    """
    row = {name: cell(value) for name, value in row.items()}
    free = [name for name, value in row.items() if isinstance(value, str) and MARK in _asked(template, row, name, MARK)]
    name = _of_user(template, row, free)
    row.update(dict.fromkeys(free, ""))  # a chat has no input
    wide = f" \n{MARK}\n "
    asked = _asked(template, row, name, wide)
    trim = wide not in asked
    parts = asked.split(MARK if trim else wide)
    words = words_of(tokenizer)
    before, after = (
        "".join(tokenizer.convert_ids_to_tokens(as_list(ids)))
        for ids in (words.before, words.after[: -ID if words.after.endswith(words.end) else None])
    )
    # SentencePiece's tokenizers put a space before a text where none is, and most of them none behind a special token
    for gap in (" ", ""):
        framed = [before + gap + parts[0], *parts[1:-1], parts[-1] + after]
        if _same_ids(template, row, name, tokenizer, framed, trim):
            break
    else:
        raise UserError(f"no chat template gives the token ids of the prompts of {template.__name__}")
    question = " + text + ".join(map(_quoted, framed[:-1])) + " + text"
    values = {"QUESTION": question, "ANSWER": _quoted(framed[-1]), "END": _quoted(tokenizer.eos_token)}
    values["TRIM"] = " | trim" if trim else ""
    return re.sub("|".join(values), lambda found: values[found.group()], JINJA)  # at once: a frame may have such a word


def _asked(template: Callable, row: dict, name: str, text: Optional[str]) -> str:
    """The prompt of a row whose `name` is this text, or which has none; "" where the template fails."""
    with suppress(Exception):  # it is the reader's own code
        changed = {**row, name: text}
        if text is None:
            del changed[name]
        return "".join(map(str, template(changed).prompt))
    return ""


def _of_user(template: Callable, row: dict, free: List[str]) -> str:
    """Which of the columns in a prompt is the user's text: the only one, or the only one that a row must have, or
    Alpaca's."""
    needed = [name for name in free if not _asked(template, row, name, None)]
    for names in (free, needed, [name for name in free if name == "instruction"]):
        if len(names) == 1:
            return names[0]
    what = f"puts together {', '.join(free)}" if free else "takes no column of text as it is"
    raise UserError(f"the template {template.__name__} {what}, and a chat's message is one text")


def _same_ids(template: Callable, row: dict, name: str, tokenizer, framed: List[str], trim: bool) -> bool:
    """Whether `framed`, as chat clients tokenize it, gives the ids of the prompts of `template`."""
    theirs = deepcopy(tokenizer.backend_tokenizer)
    theirs.encode_special_tokens = False
    theirs.no_truncation()
    theirs.no_padding()
    for question in QUESTIONS:
        asked = _asked(template, row, name, question)
        text = (question.strip() if trim else question).join(framed)
        ids = theirs.encode(text, add_special_tokens=False).ids
        if not asked or ids != encode_prompt(tokenizer, Example([asked], ""), sys.maxsize):
            return False
    return True


def _quoted(text: str) -> str:
    """As a string of Jinja, which knows the escapes of JSON."""
    return json.dumps(text, ensure_ascii=False)
