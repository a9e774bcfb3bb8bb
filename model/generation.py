"""Asking a model: one question, its answer written to the terminal as it is made, or many at once."""

from __future__ import annotations

import math
import sys
from typing import List, Sequence, Tuple

import torch
from tqdm import tqdm
from transformers import TextStreamer

from common import UserError
from common.batching import Batches
from common.losses import total_loss
from model.loss import CausalLMLoss, require_causal


def prompt_room(model, max_new_tokens: int) -> int:
    """Tokens that a prompt may have, so that the answer still fits into the model's positions. UserError if none."""
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    if max_new_tokens >= positions:
        raise UserError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt: the model has {positions} positions."
        )
    return positions - max_new_tokens


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
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    model.eval()
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )[0, prompt.shape[1] :]
    if int(output[-1]) not in ends:
        print(f"(cut after --max-new-tokens {max_new_tokens}: the answer has not ended by itself)")
    return tokenizer.decode(output, skip_special_tokens=True)


@torch.no_grad()
def answer_ids(
    model, tokenizer, prompts: List[List[int]], max_new_tokens: int, ends: Sequence[int] = ()
) -> List[List[int]]:
    """The token ids of the model's likeliest answers to `prompts` (token ids each), all at once.

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
        do_sample=False,
        eos_token_id=list(ends) or [tokenizer.eos_token_id],
        pad_token_id=tokenizer.eos_token_id,
    )
    return output[:, longest:].tolist()


def perplexity_and_answers(
    model, tokenizer, batches: Batches, prompts: List[List[int]], max_new_tokens: int, accelerator, when: str, ends=()
) -> Tuple[float, List[Tuple[str, bool]]]:
    """The perplexity (exp of the mean loss of a label token) of the first rows of `batches`, and to each of their
    prompts (token ids) the likeliest answer and whether it ended by itself; no answers where `max_new_tokens` is 0.

    `when` names the progress bar, `ends` as in answer_ids. UserError where the model has no room for the answers.
    """
    if max(map(len, prompts)) > prompt_room(model, max_new_tokens):
        raise UserError(f"--max-new-tokens {max_new_tokens} leaves no room for the longest prompt. Take fewer.")
    if not accelerator.static_shapes:
        require_causal(model, model.name_or_path)
    with_loss = CausalLMLoss(model, static_shapes=accelerator.static_shapes)
    loss, answers, at_once = 0.0, {}, batches.batch_size
    # prompts of like length together; the longest first, so that too little memory shows at once
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    with tqdm(total=len(order), desc=when, unit="row", dynamic_ncols=True) as bar:
        for rows in (order[start : start + at_once] for start in range(0, len(order), at_once)):
            loss += total_loss(with_loss, batches, rows, accelerator)
            if max_new_tokens:
                some = [prompts[row] for row in rows]
                answers.update(zip(rows, answer_ids(model, tokenizer, some, max_new_tokens, ends)))
            bar.update(len(rows))
    ends = list(ends) or [tokenizer.eos_token_id]
    answered = [
        (tokenizer.decode(answers[row], skip_special_tokens=True).strip(), not set(ends).isdisjoint(answers[row]))
        for row in sorted(answers)
    ]
    return math.exp(loss / int(batches.label_counts[order].sum())), answered
