"""From a row of text to token ids: prompt, answer, end of sequence, and what is cut when a row is too long."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from itertools import compress
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

from common.support.exit import UserError, first_line
from common.support.model_dir import explain_load_error, positions_and_embeddings, require_directory


class Example(NamedTuple):
    """A prompt in pieces and its answer, both text. The pieces at odd places may be cut, the others are the frame."""

    prompt: List[str]
    answer: Optional[str]


def load_tokenizer(model_dir: str, block_size: int = 1, hint: str = ""):
    """The tokenizer of a model directory (or of a hub id). UserError, ending in `hint`, where there is none, and where
    `block_size` is beyond the positions that the model has, or the tokenizer beyond its embeddings."""
    from transformers import AutoTokenizer

    require_directory(model_dir, hint)
    try:
        most, embeddings = positions_and_embeddings(model_dir)
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # a file of another version fails as a bare Exception
        cause = explain_load_error(error)
        if cause and not isinstance(error, ImportError):  # slow forms ask for packages that no tutorial needs
            raise UserError(f"{model_dir} can't be used: {cause}") from None
        reason = first_line(error)[:200]
        raise UserError(f"{model_dir} has no tokenizer that can be loaded ({reason}). {hint}".strip()) from None
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer of {model_dir} has no fast form (tokenizer.json), which preparing rows needs.")
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer of {model_dir} has no end token, so a model could never learn to stop.")
    if most is not None and block_size > most:
        raise UserError(f"--block-size {block_size} is beyond the {most} positions of {model_dir}; take fewer.")
    largest = largest_id(tokenizer)
    if embeddings is not None and largest >= embeddings:
        raise UserError(
            f"The tokenizer of {model_dir} has ids up to {largest}, and the model has embeddings for {embeddings} "
            "tokens, from id 0: tokens were added to the one and not to the other. Take the model's own tokenizer, or "
            "call model.resize_token_embeddings and save it."
        )
    return tokenizer


def max_prompt_tokens(positions: Optional[int], max_new_tokens: int) -> int:
    """Tokens that a prompt may have, so that its answer still fits into a model's positions, if these are known.
    UserError if none."""
    if max_new_tokens >= (positions or sys.maxsize):
        raise UserError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt: the model has {positions} positions."
        )
    return (positions or sys.maxsize) - max_new_tokens


def largest_id(tokenizer) -> int:
    """The largest id that the tokenizer can give, added tokens included."""
    return max(tokenizer.get_vocab().values())


def fingerprint(tokenizer) -> str:
    """A short hash of all that decides the ids of a text: 16 hex digits, the same in every version of the libraries."""
    probe = "Hello, world!  다람쥐 헌 쳇바퀴에 타고파.\n\tdef f(x):\n\t\treturn x != 1e-5  # naïve 👍"
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, tokenizer(probe)["input_ids"]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def encode_prompt(tokenizer, example: Example, limit: int) -> List[int]:
    """The prompt's ids as the model saw them in training: at most `limit` tokens, the row's own text cut to fit."""
    from common.cutting import fit

    return fit(tokenizer, [example.prompt], [limit])[0][0]


def encode_rows(
    rows: Sequence[dict], template: Callable[[dict], Example], tokenizer, block_size: int
) -> Tuple[List[Tuple[List[int], int]], Counter]:
    """(token ids, index of the answer's first token) of each row that has an answer; and counts of what was done.

    The ids are: bos as the tokenizer adds it, prompt, answer, the tokenizer's own end id; `block_size` at most. Prompt
    and answer are tokenized apart, so that no token spans the two and the prompt has the same ids as in a question.
    Counted are rows, tokens, dropped, prompts cut, answers cut. Raises UserError where a row lacks a column or has an
    answer without a token, and where a block has no room for an answer.
    """
    from common.columns import applied, place_of
    from common.cutting import fit
    from common.words import BEGIN, as_list, words_of

    examples = [applied(template, row) for row in rows]
    has_answer = [bool(example.answer and example.answer.strip()) for example in examples]
    answered = list(compress(examples, has_answer))
    counts = Counter({"rows": len(answered), "dropped": len(examples) - len(answered)})
    words = words_of(tokenizer)
    parts = words.ids([words.units(BEGIN + example.answer) for example in answered])
    answers = [as_list(b"".join(ids)) for ids in parts]
    if not all(answers):  # of letters that the tokenizer leaves out: it would learn to say nothing, or nothing at all
        place = place_of(list(compress(rows, has_answer))[answers.index([])])
        raise UserError(f"{place}: the tokenizer makes no token of its answer, so there is nothing to learn. Mend it.")
    limits = [block_size - len(answer) - 1 for answer in answers]
    encoded = []
    for answer, (prompt, cut) in zip(answers, fit(tokenizer, [example.prompt for example in answered], limits)):
        if cut:
            counts["prompts cut"] += 1
        room = block_size - len(prompt) - 1
        if room < 1:
            raise UserError(
                f"A block of {block_size} tokens has no room for an answer: the template's own text takes "
                f"{len(prompt)}. Take a larger --block-size."
            )
        if len(answer) > room:
            counts["answers cut"] += 1
        encoded.append((prompt + answer[:room] + [tokenizer.eos_token_id], len(prompt)))
    if encoded:
        counts["tokens"] = sum(len(ids) for ids, _ in encoded)
    return encoded, counts
