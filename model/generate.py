"""A model's answers, one as it is generated or many in batches, and its perplexity on held-out rows."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence

import torch
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from common.batches import Batches
from common.dataset_file import stop_token_ids
from common.device import explain_out_of_memory
from common.support.exit import UserError
from common.tokenization import max_prompt_tokens
from common.train_log import run_facts, with_progress
from common.trainer import total_loss
from model.loss import CausalLMLoss, require_causal
from model.probe import probe_ids

INCOMPLETE = "\ufffd"
WINDOW_BATCHES = 8  # whose prompts are sorted together, and whose answers are saved together
MEMORY_SAVING = ("--batch-rows", "--load-in-4bit", "--max-new-tokens")


class Answer(NamedTuple):
    """The text of an answer, and whether it ended with a stop token."""

    text: str
    ended: bool


def decode(tokenizer, ids: List[int]) -> str:
    """The text of `ids` with the model's own spaces, without special tokens, and without half a letter at its end.

    A letter can take four tokens; while some are missing, the others are decoded as U+FFFD. SentencePiece decodes the
    complete letters before them so as well. These are found by leaving out the last tokens.
    """
    texts = []
    for left_out in range(4):
        part = ids[: len(ids) - left_out]
        text = tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts.append(text.rstrip(INCOMPLETE))
        if text == texts[-1]:
            break
    return max(texts, key=len)


class Part(NamedTuple):
    """A batch that is done: its rows, and the answers of all batches of its window if it is the last one of them."""

    rows: int
    answers: List[Answer]


class AnswerStreamer(BaseStreamer):
    """Hands on each new piece of an answer's text while it is generated.

    All tokens are decoded each time: a SentencePiece tokenizer drops a space at the beginning of what it decodes.
    """

    def __init__(self, tokenizer, write: Callable[[str], None]):
        self.tokenizer = tokenizer
        self.write = write
        self.ids: Optional[List[int]] = None
        self.written = ""

    def put(self, ids: torch.Tensor) -> None:
        """Called by transformers, first with the prompt, which is left out, and then with one token at a time."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += ids.tolist()
        text = decode(self.tokenizer, self.ids)
        if text.startswith(self.written):
            self.write(text[len(self.written) :])
            self.written = text

    def end(self) -> None:
        """Called by transformers after the last token."""


class StopWhenSet(StoppingCriteria):
    """Ends all answers of a batch at their next token, once `event` is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def prompt_room(model, max_new_tokens: int) -> int:
    """The tokens that a prompt of this model may have, so that its answer still fits. UserError if there are none."""
    return max_prompt_tokens(getattr(model.config, "max_position_embeddings", None), max_new_tokens)


@torch.no_grad()
def generate_answers(
    model,
    tokenizer,
    prompts: List[List[int]],
    max_new_tokens: int,
    ends: Sequence[int] = (),
    temperature: float = 0.0,
    streamer: Optional[BaseStreamer] = None,
    stop: Optional[threading.Event] = None,
) -> List[Answer]:
    """The answers to `prompts` (token ids each), all in one batch: greedy if `temperature` is 0, else sampled.

    An answer stops at one of the token ids `ends`, at the end tokens of tokenizer and model, and when `stop` is set.
    """
    ends = stop_token_ids({"end_tokens": ends}, tokenizer, model)
    longest = max(map(len, prompts))
    # Padded on the left, so that every answer follows directly after its prompt.
    ids = [[tokenizer.eos_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    model.eval()
    output = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.eos_token_id,
        do_sample=temperature > 0,
        temperature=float(temperature) or 1.0,  # transformers refuses 1, an int
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([StopWhenSet(stop)] if stop else []),
    )
    answers = []
    for answer in output[:, longest:].tolist():
        stop = next((number for number, token in enumerate(answer, 1) if token in ends), None)
        answers.append(Answer(decode(tokenizer, answer[:stop]), stop is not None))
    return answers


def stream_answer(
    model,
    tokenizer,
    prompt: List[int],
    max_new_tokens: int,
    temperature: float,
    ends: Sequence[int] = (),
    show_prompt: bool = True,
) -> str:
    """Print the answer to `prompt` token by token, below the prompt if it is shown; return the answer."""
    if show_prompt:
        print(decode(tokenizer, prompt), flush=True)
    streamer = AnswerStreamer(tokenizer, lambda text: print(text, end="", flush=True))
    with explain_out_of_memory("the answer", model.device, MEMORY_SAVING[1:]):
        [answer] = generate_answers(model, tokenizer, [prompt], max_new_tokens, ends, temperature, streamer)
    print()
    if not answer.ended:
        print(f"(stopped at --max-new-tokens {max_new_tokens})")
    return answer.text


def iterate_answer(
    model, tokenizer, prompt: List[int], max_new_tokens: int, temperature: float, ends: Sequence[int] = ()
) -> Iterator[Answer]:
    """The answer to `prompt` as far as it is generated, again and again; the last one is the complete answer.

    A thread generates it. It stops at its next token when the iterator is closed.
    """
    pieces: SimpleQueue = SimpleQueue()
    streamer = AnswerStreamer(tokenizer, pieces.put)
    stop = threading.Event()
    with ThreadPoolExecutor(1, "answer") as thread:
        answering = thread.submit(
            generate_answers, model, tokenizer, [prompt], max_new_tokens, ends, temperature, streamer, stop
        )
        answering.add_done_callback(lambda _: pieces.put(None))
        text = ""
        try:
            for piece in iter(pieces.get, None):
                text += piece
                yield Answer(text, ended=False)
        finally:
            stop.set()
    with explain_out_of_memory("the answer", model.device, MEMORY_SAVING[1:]):
        [answer] = answering.result()
    yield answer


def generate_in_batches(
    model, tokenizer, prompts: List[List[int]], args, ends: Sequence[int] = (), temperature: float = 0.0
) -> Iterator[Part]:
    """The answers to `prompts` in their order, `args.batch_rows` at a time, of at most `args.max_new_tokens` tokens.

    One at a time where the padding of a batch would change them. Prompts of like lengths share a batch, and are sorted
    for it within windows of some batches, so that the answers of a window can be saved before all are there.
    """
    if max(map(len, prompts)) > prompt_room(model, args.max_new_tokens):
        raise UserError(f"--max-new-tokens {args.max_new_tokens} leaves no room for the longest prompt. Use fewer.")
    with explain_out_of_memory("a batch of answers", model.device, MEMORY_SAVING):
        rows = 1 if args.batch_rows > 1 and padding_changes_answers(model) else args.batch_rows
    window = rows * WINDOW_BATCHES if rows > 1 else 1
    for start in range(0, len(prompts), window):
        numbers = range(start, min(start + window, len(prompts)))
        longest_first = sorted(numbers, key=lambda number: len(prompts[number]), reverse=True)
        answers = {}
        for first in range(0, len(longest_first), rows):
            batch = longest_first[first : first + rows]
            asked = [prompts[number] for number in batch]
            with explain_out_of_memory("a batch of answers", model.device, MEMORY_SAVING), TokenBar(args) as bar:
                answered = generate_answers(model, tokenizer, asked, args.max_new_tokens, ends, temperature, bar)
            answers.update(zip(batch, answered))
            is_complete = len(answers) == len(numbers)
            yield Part(len(batch), [answers[number] for number in numbers] if is_complete else [])


@torch.no_grad()
def padding_changes_answers(model) -> bool:
    """Whether padding on the left changes what a model answers (RWKV, RecurrentGemma), which it should not.

    The model itself is asked, for three tokens. Padding that is read as text changes the logits by some amount, hidden
    padding by rounding alone: by less than a thousandth of that in float32, by up to a tenth in 16 and 4 bit.
    """
    model.eval()
    padding, prompt = probe_ids(model, 12).split(6, dim=1)

    def logits(input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=3,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda *_: [0],  # the same answer each time
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(output.logits).float()

    padded = torch.cat([padding, prompt], dim=1)
    hidden = torch.cat([torch.zeros_like(padding), torch.ones_like(prompt)], dim=1)
    alone = logits(prompt, torch.ones_like(prompt))
    as_text = logits(padded, torch.ones_like(padded))
    share_of_rounding = 0.05 if model.dtype == torch.float32 else 0.2
    change = (logits(padded, hidden) - alone).abs().mean()
    return bool(change > share_of_rounding * (as_text - alone).abs().mean())


class TokenBar(BaseStreamer):
    """On a terminal, a bar of the tokens of the batch under way: the bar of the answers stands still meanwhile."""

    def __init__(self, args):
        self.bar = tqdm(total=args.max_new_tokens, desc="tokens", unit="token", leave=False, disable=None)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def put(self, ids) -> None:
        """Called by transformers, first with the prompts and then with each new token of all answers."""
        self.bar.update(ids.dim() == 1)

    def end(self) -> None:
        """Called by transformers after the last token."""


def answer_questions(model, tokenizer, prompts: List[List[int]], answers, args, device, ends=()) -> None:
    """Print the answer to the only prompt; or save those of a file of prompts in `answers`, its AnswersFile."""
    if answers is None:
        stream_answer(model, tokenizer, prompts[0], args.max_new_tokens, args.temperature, ends)
        return
    done, total = answers.answered, len(answers.rows)
    if done:
        print(f"Continuing: {done} of {total} rows are answered in {answers.path}", flush=True)
    answers.begin(run_facts(vars(args), {}, device.name))
    batches = generate_in_batches(model, tokenizer, prompts, args, ends, args.temperature)
    for part in with_progress(batches, lambda part: part.rows, "answers", total, done):
        answers.add(part.answers)
    print(f"Saved {answers.answered} answers in {answers.path} ({answers.count_ended()} ended with a stop token)")


def perplexity(model, batches: Batches, num_rows: int, device) -> float:
    """exp of the mean loss of an answer token, over the first `num_rows` rows of `batches`."""
    if not device.static_shapes:
        require_causal(model, model.name_or_path)
    with_loss = CausalLMLoss(model, static_shapes=device.static_shapes)
    rows = list(range(num_rows))
    bar = tqdm(desc="perplexity", unit="micro-batch", leave=False, disable=None)  # None: on a terminal alone
    with bar, explain_out_of_memory("a batch of rows", model.device, MEMORY_SAVING[:2]):
        return math.exp(total_loss(with_loss, batches, rows, device, bar.update) / batches.num_labels(rows))
