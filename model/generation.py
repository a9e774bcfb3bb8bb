"""Asking a model: one question, its answer written to the terminal as it is made, or many at once."""

from __future__ import annotations

import math
from typing import Dict, List, Sequence, Tuple

import torch
from tqdm import tqdm
from transformers import TextStreamer

from common.batches import Batches
from common.device import explain_out_of_memory
from common.support.exit import UserError
from common.tokenization import max_prompt_tokens
from common.train_log import run_facts, with_progress
from common.trainer import total_loss
from model.loss import CausalLMLoss, require_causal

MEMORY_SAVING = ("--batch-rows", "--load-in-4bit", "--max-new-tokens")


def prompt_room(model, max_new_tokens: int) -> int:
    """Tokens that a prompt of this model may have beside its answer. UserError if none."""
    return max_prompt_tokens(getattr(model.config, "max_position_embeddings", None), max_new_tokens)


@torch.no_grad()
def stream_answer(
    model, tokenizer, prompt_ids: List[int], max_new_tokens: int, temperature: float, ends=(), show_prompt: bool = True
) -> str:
    """Print the prompt, if it is to be shown, and the model's answer to it, token by token, until one of the tokens
    `ends`, without any the tokenizer's own; return the answer.

    Greedy where `temperature` is 0, sampled otherwise.
    """
    prompt, ends = torch.tensor([prompt_ids], device=model.device), list(ends) or [tokenizer.eos_token_id]
    if show_prompt:
        print(tokenizer.decode(prompt[0], skip_special_tokens=True), flush=True)
    model.eval()
    with explain_out_of_memory("the answer", model.device, ["--load-in-4bit", "--max-new-tokens"]):
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=tokenizer.eos_token_id,
            **_sampling(temperature),
        )[0, prompt.shape[1] :]
    if int(output[-1]) not in ends:
        print(f"(cut after --max-new-tokens {max_new_tokens}: the answer has not ended by itself)")
    return tokenizer.decode(output, skip_special_tokens=True)


@torch.no_grad()
def answer_ids(
    model, tokenizer, prompts: List[List[int]], max_new_tokens: int, ends: Sequence[int] = (), temperature: float = 0.0
) -> List[List[int]]:
    """The token ids of the model's answers to `prompts` (token ids each), all at once: the likeliest ones where
    `temperature` is 0, sampled otherwise.

    An answer that ended by itself has one of the tokens `ends` in it, without any the tokenizer's own. Padded on the
    left, so that every answer goes on right where its prompt ends.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.eos_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.eval()
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or [tokenizer.eos_token_id],
        pad_token_id=tokenizer.eos_token_id,
        **_sampling(temperature),
    )
    return output[:, longest:].tolist()


def answer_rows(
    model, tokenizer, prompts: Dict[int, List[int]], answers, args, device, ends: Sequence[int] = ()
) -> None:
    """Answer `prompts`, {row: token ids} of a file of prompts, `args.batch_rows` at once, and save the answers of each
    batch in `answers`, a dataset.questions.AnswersFile, as soon as it is done. `ends` as in answer_ids.
    """
    ends = list(ends) or [tokenizer.eos_token_id]
    rows = list(prompts)
    batches = [rows[start : start + args.batch_rows] for start in range(0, len(rows), args.batch_rows)]
    total = len(answers.rows)
    if answers.answered:
        print(f"Continuing: {answers.answered} of {total} rows are answered in {answers.path}", flush=True)
    answers.begin(run_facts(vars(args), {}, device.name))
    with explain_out_of_memory("a batch of answers", model.device, MEMORY_SAVING):
        for batch in with_progress(batches, len, "answers", total, answers.answered):
            some = [prompts[row] for row in batch]
            found = answer_ids(model, tokenizer, some, args.max_new_tokens, ends, args.temperature)
            answers.add([text_and_end(tokenizer, ids, ends) for ids in found])
    print(f"Saved {answers.answered} answers in {answers.path} ({answers.ended} ended with a stop token)")


def _of_like_length(prompts: Dict[int, List[int]], at_once: int) -> List[List[int]]:
    """The rows, `at_once` together; the longest first, so that too little memory shows at once."""
    order = sorted(prompts, key=lambda row: -len(prompts[row]))
    return [order[start : start + at_once] for start in range(0, len(order), at_once)]


def text_and_end(tokenizer, ids: List[int], ends: Sequence[int]) -> Tuple[str, bool]:
    """The text of an answer, and whether one of the tokens `ends` is in it, at which it ends."""
    end = next((place for place, token in enumerate(ids, 1) if token in ends), 0)
    return tokenizer.decode(ids[: end or len(ids)], skip_special_tokens=True), bool(end)


def _sampling(temperature: float) -> dict:
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def perplexity_and_answers(
    model, tokenizer, batches: Batches, prompts: List[List[int]], max_new_tokens: int, device, when: str, ends=()
) -> Tuple[float, List[Tuple[str, bool]]]:
    """The perplexity (exp of the mean loss of a label token) of the first rows of `batches`, and to each of their
    prompts (token ids) the likeliest answer and whether it ended by itself; no answers where `max_new_tokens` is 0.

    `when` names the progress bar, `ends` as in answer_ids. UserError where the model has no room for the answers.
    """
    if max(map(len, prompts)) > prompt_room(model, max_new_tokens):
        raise UserError(f"--max-new-tokens {max_new_tokens} leaves no room for the longest prompt. Take fewer.")
    if not device.static_shapes:
        require_causal(model, model.name_or_path)
    with_loss = CausalLMLoss(model, static_shapes=device.static_shapes)
    loss, answers = 0.0, {}
    bar = tqdm(total=len(prompts), desc=when, unit="row", dynamic_ncols=True)
    with bar, explain_out_of_memory("a batch of answers", model.device, MEMORY_SAVING):
        for rows in _of_like_length(dict(enumerate(prompts)), batches.batch_size):
            loss += total_loss(with_loss, batches, rows, device)
            if max_new_tokens:
                some = [prompts[row] for row in rows]
                answers.update(zip(rows, answer_ids(model, tokenizer, some, max_new_tokens, ends)))
            bar.update(len(rows))
    ends = list(ends) or [tokenizer.eos_token_id]
    answered = [text_and_end(tokenizer, answers[row], ends) for row in sorted(answers)]
    answered = [(text.strip(), ended) for text, ended in answered]
    return math.exp(loss / int(batches.label_counts[: len(prompts)].sum())), answered
