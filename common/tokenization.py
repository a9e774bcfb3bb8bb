"""From text to token ids: prompt, answer and end token, and the truncation of prompts that exceed the block size.

An Example is text alone: what columns a row has, and how a template makes an Example of it, is the matter of dataset/.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from importlib.metadata import version
from typing import List, NamedTuple, Optional, Sequence, Set, Tuple

from common.support.exit import UserError, first_line
from common.support.model_dir import ModelSource, explain_load_error, positions_and_embeddings, require_directory

MAX_LETTERS = 2_000_000  # of a text that is tokenized as a whole: it takes seconds, and some 2 GB of memory
# A text far longer than its limit is tokenized without its middle: some 4 letters are a token of English text.
LETTERS_PER_TOKEN = 5
MARGIN = 64  # letters at a cut that may become other tokens
BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")


class Example(NamedTuple):
    """A prompt in pieces, and its answer.

    The pieces at odd places (the second, the fourth) are the row's own text, which may be truncated. The others are
    the template's frame, which always stays. A question has no answer.
    """

    prompt: List[str]
    answer: Optional[str]


class Encoded(NamedTuple):
    """An example, or a conversation, as a row of the dataset file."""

    ids: List[int]
    mask: bytes  # for each id 1 if it is in the loss (an answer, or the token that ends it), else 0
    prompt_truncated: bool
    answer_truncated: bool
    num_answers: int = 1
    remarks: Sequence[str] = ()  # what its chat template does with an answer that the reader should know


def last_ids(ids: Sequence[int], mask: bytes) -> Set[int]:
    """The ids with which the answers of a row end."""
    return {ids[last.start()] for last in re.finditer(b"\1(?!\1)", mask)}


def load_tokenizer(model_dir: str, block_size: int = 1, hint: str = ""):
    """The tokenizer of a model directory (or of a hub id).

    UserError, which ends with `hint`, if there is none; and if `block_size` exceeds the positions of the model, or the
    tokenizer has ids that the model has no embeddings for.
    """
    from transformers import AutoTokenizer

    require_directory(model_dir, hint)
    try:
        positions, embeddings = positions_and_embeddings(model_dir)
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # a file of another version fails as a bare Exception
        cause = explain_load_error(error)
        if cause and not isinstance(error, ImportError):  # slow tokenizers ask for packages that no tutorial needs
            raise UserError(f"{model_dir} can't be used: {cause}") from None
        reason = first_line(error)[:200]
        raise UserError(f"{model_dir} has no tokenizer that can be loaded ({reason}). {hint}".strip()) from None
    if not tokenizer.is_fast:
        raise UserError(f"{model_dir} has no fast tokenizer (tokenizer.json), which is required.")
    # Llama 3's own setting: decoded text would lose spaces, as in `x != y`.
    tokenizer.clean_up_tokenization_spaces = False
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer of {model_dir} has no end token, so the model could not learn to stop.")
    if positions is not None and block_size > positions:
        raise UserError(f"--block-size {block_size} exceeds the {positions} positions of {model_dir}. Use fewer.")
    trained = ModelSource(model_dir).run.get("dataset", {})
    made_by, installed = trained.get("transformers", ""), version("transformers")
    # Without end_tokens, it is of an older version of these scripts, and its fingerprint is another.
    if made_by != installed and "end_tokens" in trained and trained.get("tokenizer") != fingerprint(tokenizer):
        print(
            f"{model_dir} was trained with transformers {made_by}, and {installed} tokenizes some texts differently: "
            f"pip install transformers=={made_by}"
        )
    largest = largest_id(tokenizer)
    if embeddings is not None and largest >= embeddings:
        raise UserError(
            f"The tokenizer of {model_dir} has ids up to {largest}, but the model has only {embeddings} embeddings: "
            "tokens were added to the tokenizer alone. Use the model's own tokenizer, or call "
            "model.resize_token_embeddings and save the model."
        )
    return tokenizer


def load_tokenizer_of_both(model_dir: str, base_dir: str):
    """The tokenizer of a trained model. UserError unless the model before the training has the same."""
    tokenizer = load_tokenizer(model_dir)
    if fingerprint(load_tokenizer(base_dir)) != fingerprint(tokenizer):
        raise UserError(
            f"{base_dir} has another tokenizer than {model_dir}: it can't have been its base. Give the right one with "
            "--base-model-name-or-path."
        )
    return tokenizer


def largest_id(tokenizer) -> int:
    """The largest id that the tokenizer can produce, added tokens included."""
    return max(tokenizer.get_vocab().values())


def fingerprint(tokenizer) -> str:
    """A hash of all that decides the ids of a text: 16 hex digits, the same in every version of the libraries that
    tokenizes alike."""
    bos = tokenizer.bos_token or ""
    probes = [
        "Hello, world!  다람쥐 헌 쳇바퀴에 타고파.\n\tdef f(x):\n\t\treturn x != 1e-5  # naïve 👍",
        *(" a", "  a  b  ", "\na\n\nb\n", "\ta\t"),
        *(f"{bos}a", f"{bos} a"),  # as in the text of a chat template
    ]
    ids = [tokenizer(probe)["input_ids"] for probe in probes]
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, ids]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def max_prompt_tokens(positions: Optional[int], max_new_tokens: int) -> int:
    """The tokens that a prompt may have, so that its answer still fits into the model's positions (None: unlimited).

    UserError if there is no room for a prompt.
    """
    limit = (positions or sys.maxsize) - max_new_tokens
    if limit < 1:
        raise UserError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt: the model has {positions} positions."
        )
    return limit


# ------------------------------------------------------------------------------------------------ encoding


def require_length(text: str, name: str = "") -> None:
    """UserError for a text whose tokenization would take minutes."""
    if len(text) > MAX_LETTERS:
        name = name or f"the text that begins with {text[:40]!r}"
        raise UserError(f"{name} has {len(text):,} letters, and {MAX_LETTERS:,} is the most. Shorten it.")


def encode_examples(tokenizer, examples: Sequence[Example], block_size: int) -> List[Encoded]:
    """The token ids of examples with an answer: prompt, answer, end token, at most `block_size` together.

    `bos` is added to the prompt as the tokenizer does it, and the end token as an id, because its text may be ordinary
    text for another tokenizer. Prompt and answer are tokenized apart: so no token spans both, and a prompt has the
    same ids when the model is asked. Raises UserError if the prompt's frame leaves no room for an answer.
    """
    answers = [encoding.ids for encoding in _encode(tokenizer, [example.answer for example in examples], False)]
    limits = [block_size - len(answer) - 1 for answer in answers]
    prompts = _encode_prompts(tokenizer, [example.prompt for example in examples], limits)
    encoded = []
    for (prompt, truncated), answer in zip(prompts, answers):
        room = block_size - len(prompt) - 1
        if room < 1:
            raise UserError(
                f"--block-size {block_size} leaves no room for an answer: the prompt template alone takes "
                f"{len(prompt)} tokens. Use a larger --block-size."
            )
        ids = prompt + answer[:room] + [tokenizer.eos_token_id]
        mask = bytes(len(prompt)) + b"\1" * (len(ids) - len(prompt))
        encoded.append(Encoded(ids, mask, truncated, len(answer) > room))
    return encoded


def encode_prompt(tokenizer, example: Example, limit: int) -> List[int]:
    """The prompt's token ids, at most `limit`, truncated as in training."""
    [(ids, _)] = _encode_prompts(tokenizer, [example.prompt], [limit])
    return ids


def _encode(tokenizer, texts: List[str], add_special_tokens: bool) -> list:
    """An Encoding (ids, offsets, ...) for each text, made on all cores.

    Text that looks like a control token (`</s>`, `<|endoftext|>`) stays text.
    """
    for text in texts:
        require_length(text)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        return backend.encode_batch(texts, add_special_tokens=add_special_tokens)
    finally:
        backend.encode_special_tokens = False  # as transformers expects it


def _without_end(tokenizer, encoding) -> List[int]:
    """The ids without an end token that the tokenizer adds itself: a prompt goes on with its answer."""
    ids = encoding.ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


# ------------------------------------------------------------------------------------------------ truncation


def truncate_prompt(pieces: List[str], encoding, excess: int) -> Optional[List[str]]:
    """`pieces` with their last text cut where its last `excess` tokens begin; None if only the frame is left.

    `encoding` is that of the joined pieces. Of its offsets the begins alone are used: in tokenizers before 0.20.1 the
    end of a token of Llama3 is wrong (a whole word ends where it begins).
    """
    last = _last_text(pieces)
    if last is None:
        return None
    start = sum(len(piece) for piece in pieces[:last])
    stop = start + len(pieces[last])
    begins = []
    for (begin, _), special in zip(encoding.offsets, encoding.special_tokens_mask):
        if start <= begin < stop and not special:
            begins.append(begin - start)
    cut = begins[-excess] if excess < len(begins) else 0
    cut = min(cut, len(pieces[last]) - 1)  # one letter at least goes, so that this comes to an end
    return pieces[:last] + [pieces[last][:cut]] + pieces[last + 1 :]


def _last_text(pieces: List[str]) -> Optional[int]:
    """The place of the last piece that may be truncated and is not empty."""
    return max((place for place in range(1, len(pieces), 2) if pieces[place]), default=None)


def _encode_prompts(tokenizer, prompts: List[List[str]], limits: List[int]) -> List[Tuple[List[int], bool]]:
    """(token ids, whether it was truncated) of each prompt.

    The text is truncated, not the ids, and tokenized again, until it fits or nothing but the frame is left: so every
    prompt is what the tokenizer makes of some text.
    """
    kept = _truncate_long_texts(tokenizer, prompts, limits)
    ids = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    while rows:
        too_long = []
        for row, encoding in zip(rows, _encode(tokenizer, ["".join(kept[row]) for row in rows], True)):
            ids[row] = _without_end(tokenizer, encoding)
            excess = len(ids[row]) - limits[row]
            shorter = truncate_prompt(kept[row], encoding, excess) if excess > 0 else None
            if shorter is not None:
                kept[row] = shorter
                too_long.append(row)
        rows = too_long
    return [(ids[row], kept[row] != prompt) for row, prompt in enumerate(prompts)]


def _truncate_long_texts(tokenizer, prompts: List[List[str]], limits: List[int]) -> List[List[str]]:
    """The prompts, those truncated once whose text is far longer than their limit.

    Their text is tokenized without its middle, which is removed between two words. So all tokens near the cut and at
    the end are those of the whole text, and the cut is the same. If the cut is not safely before the removed middle,
    the text needs fewer tokens than expected, and the prompt stays as it is.
    """
    kept = list(prompts)
    shortened = {}
    for row, (prompt, limit) in enumerate(zip(prompts, limits)):
        last = _last_text(prompt)
        text = prompt[last] if last is not None else ""
        head = BETWEEN_WORDS.search(text, min(max(limit, 0) * LETTERS_PER_TOKEN + MARGIN, len(text)))
        tail = BETWEEN_WORDS.search(text, max(0, len(text) - 4 * MARGIN))
        if head and tail and head.start() < tail.start() <= len(text) - MARGIN:
            shorter = text[: head.start()] + text[tail.start() :]
            shortened[row] = prompt[:last] + [shorter] + prompt[last + 1 :]
    encodings = _encode(tokenizer, ["".join(pieces) for pieces in shortened.values()], True)
    for (row, pieces), encoding in zip(shortened.items(), encodings):
        excess = len(_without_end(tokenizer, encoding)) - limits[row]
        if excess > 0:
            last = _last_text(pieces)
            truncated = truncate_prompt(pieces, encoding, excess)
            if len(truncated[last]) <= max(limits[row], 0) * LETTERS_PER_TOKEN:
                kept[row] = truncated
    return kept
