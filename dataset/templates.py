"""The one place where a row of each dataset becomes a prompt and an answer.

`prepare_*` and `inference_*` call the same function, so the model is asked in exactly the format in which it learned.
A template takes a row (a dict of strings) and returns an `Example`: the prompt in pieces and the answer. The pieces at
odd places (the second, the fourth) are the row's own text, which is cut where a row is too long; the others are the
frame, which always stays. A question is a row whose answer is empty. Alpaca's blocks may be of a row without `input`.
"""

from __future__ import annotations

from common.tokenization import Example


def summarization(row: dict) -> Example:
    """abisee/cnn_dailymail: a news article -> its highlights."""
    return Example(["[SUMMARIZE] ", row["article"], " [/SUMMARIZE]\n"], row["highlights"])


def alpaca(row: dict) -> Example:
    """iamtarun/python_code_instructions_18k_alpaca and the standard library's functions: Alpaca's blocks -> code."""
    return Example(
        ["### Instruction:\n", row["instruction"], "\n\n### Input:\n", row.get("input", ""), "\n\n### Output:\n"],
        row["output"],
    )


def instruction(row: dict) -> Example:
    """mlabonne/Evol-Instruct-Python-26k: an instruction -> text and code."""
    return Example(["[INST] ", row["instruction"], " [/INST]\n"], row["output"])


def korean_alpaca(row: dict) -> Example:
    """jojo0217/korean_safe_conversation: Alpaca's blocks in lower case -> a Korean answer."""
    return Example(
        ["### instruction:\n", row["instruction"], "\n\n### input:\n", row.get("input", ""), "\n\n### output:\n"],
        row["output"],
    )
