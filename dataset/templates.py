"""The one place where a row of a dataset becomes a prompt and an answer.

`prepare_*` and `inference_*` call the same function, so the model is asked in exactly the format in which it learned.
A template takes a row (a dict of strings) and returns an `Example`: the prompt in pieces and the answer. The pieces at
odd places (the second, the fourth) are the row's own text, which is truncated if a row is too long; the others are the
frame, which always stays. A question is a row whose answer is empty. A row of Alpaca's blocks may have no `input`.

Chat clients and servers do not call these functions: they use the chat template that is saved with the model's
tokenizer, a program in Jinja (https://huggingface.co/docs/transformers/chat_templating). So each template has its
format in Jinja next to it, as the text before and after a question. Copy both for a template of your own.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Callable

from common.chat_template import Conversation
from common.support.exit import UserError
from common.support.model_dir import ModelSource
from common.tokenization import Example
from dataset.columns import to_text
from dataset.messages import read_history

MESSAGE_COLUMNS = ("messages", "conversations")  # the usual name, and ShareGPT's


def summarization(row: dict) -> Example:
    """abisee/cnn_dailymail: a news article -> its highlights."""
    return Example(["[SUMMARIZE] ", row["article"], " [/SUMMARIZE]\n"], row["highlights"])


summarization.jinja = r"""
{%- set before = "[SUMMARIZE] " %}
{%- set after = " [/SUMMARIZE]\n" %}
"""


def alpaca(row: dict) -> Example:
    """iamtarun/python_code_instructions_18k_alpaca: Alpaca's blocks -> Python code."""
    return Example(
        ["### Instruction:\n", row["instruction"], "\n\n### Input:\n", row.get("input", ""), "\n\n### Output:\n"],
        row["output"],
    )


alpaca.jinja = r"""
{%- set before = "### Instruction:\n" %}
{%- set after = "\n\n### Input:\n\n\n### Output:\n" %}
"""


def short_alpaca(row: dict) -> Example:
    """Sentences with numbers, and any instruction and output: Alpaca's blocks, ### Input: only where a row has one."""
    prompt = ["### Instruction:\n", row["instruction"]]
    if row.get("input"):
        prompt += ["\n\n### Input:\n", row["input"]]
    return Example([*prompt, "\n\n### Output:\n"], row["output"])


short_alpaca.jinja = r"""
{%- set before = "### Instruction:\n" %}
{%- set after = "\n\n### Output:\n" %}
"""


def instruction(row: dict) -> Example:
    """mlabonne/Evol-Instruct-Python-26k: an instruction -> text and code."""
    return Example(["[INST] ", row["instruction"], " [/INST]\n"], row["output"])


instruction.jinja = r"""
{%- set before = "[INST] " %}
{%- set after = " [/INST]\n" %}
"""


def korean_alpaca(row: dict) -> Example:
    """jojo0217/korean_safe_conversation: Alpaca's blocks in lower case -> a Korean answer."""
    return Example(
        ["### instruction:\n", row["instruction"], "\n\n### input:\n", row.get("input", ""), "\n\n### output:\n"],
        row["output"],
    )


korean_alpaca.jinja = r"""
{%- set before = "### instruction:\n" %}
{%- set after = "\n\n### input:\n\n\n### output:\n" %}
"""


def chat(row: dict) -> Conversation:
    """`messages`, ShareGPT's `conversations`, or instruction, input and output as a question and its answer.

    `system` is the system message if the messages have none, `history` the earlier turns, each [question, answer].
    """
    for name in MESSAGE_COLUMNS:
        if row.get(name):
            return Conversation(row[name], row.get("tools"), row.get("system"))
    if "instruction" not in row:  # KeyError, which names the column that is missing
        return Conversation(row["conversations"] if "conversations" in row else row["messages"])
    texts = [to_text(row["instruction"]), to_text(row.get("input", ""))]
    question = "\n\n".join(text for text in texts if text.strip())
    turns = [*read_history(row.get("history")), (question, row["output"])]
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
    return Conversation(messages, row.get("tools"), row.get("system"))


def template_of(model_dir: str) -> Callable:
    """The template with which a model or an adapter was trained. UserError where nothing says so, or it is not here."""
    name = ModelSource(model_dir).template
    if name is None:
        raise UserError(f"{model_dir} has no run.json that says which prompt template it was trained with.")
    template = globals().get(name)
    if getattr(template, "__module__", None) != __name__:
        raise UserError(
            f"{model_dir} was trained with the prompt template {name}. Add it to dataset/templates.py, which lacks it."
        )
    return template


# Each turn is a row of the training, from bos to the end token, because the model has seen no other format. A system
# text is put before the next question.
START = r"""{%- set bos = BOS %}
{%- set space = SPACE %}"""
TURNS = r"""{%- set system = namespace(text="") %}
{%- for message in messages %}
    {%- if message["role"] in ["system", "developer"] %}
        {%- set system.text = system.text + message["content"] + "\n\n" %}
    {%- elif message["role"] == "user" %}
        {{- bos + space + before + system.text + message["content"] }}
        {%- set system.text = "" %}
    {%- elif message["role"] == "assistant" %}
        {{- after + message["content"] + eos_token }}
    {%- else %}
        {{- raise_exception("This model was trained on questions and answers, not on messages of " + message["role"]) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- after }}
{%- endif %}
"""


def jinja_template(template: Callable, tokenizer) -> str:
    """The chat template in the format of `template`, "" if it has none: with it, a question has the same token ids as
    its prompt in training."""
    if not hasattr(template, "jinja"):
        return ""
    ids, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    before = ids[: ids.index(plain[0])]
    bos = "".join(tokenizer.convert_ids_to_tokens(before))
    # SentencePiece puts a space before a text, but most of its tokenizers put none after a special token.
    joined = tokenizer(bos + "a", add_special_tokens=False)["input_ids"]
    space = "" if joined == before + plain else " "
    if space:
        print(
            f"The chat template saved with the model is for transformers {version('transformers')}: others may "
            f"tokenize the space after {bos} differently."
        )
    start = START.replace("BOS", json.dumps(bos, ensure_ascii=False)).replace("SPACE", json.dumps(space))
    return start + template.jinja + TURNS
