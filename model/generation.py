"""Asking a model: the prompt in the format of its training, the answer written to the terminal as it is made."""

from __future__ import annotations

import sys
from typing import List

import torch
from transformers import TextStreamer

from common import UserError


def prompt_room(model, max_new_tokens: int) -> int:
    """Tokens that a prompt may have, so that the answer still fits into the model's positions. UserError if none."""
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    if max_new_tokens >= positions:
        raise UserError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt: the model has {positions} positions."
        )
    return positions - max_new_tokens


@torch.no_grad()
def stream_answer(model, tokenizer, prompt_ids: List[int], args) -> str:
    """Print the prompt and the model's answer to it, token by token, until the end token; return the answer.

    Greedy where `args.temperature` is 0, sampled otherwise; `args.max_new_tokens` at most.
    """
    prompt = torch.tensor([prompt_ids], device=model.device)
    print(tokenizer.decode(prompt[0], skip_special_tokens=True), flush=True)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    model.eval()
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        max_new_tokens=args.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )[0, prompt.shape[1] :]
    if output[-1] != tokenizer.eos_token_id:
        print(f"(cut after --max-new-tokens {args.max_new_tokens}: the answer has not ended by itself)")
    return tokenizer.decode(output, skip_special_tokens=True)


@torch.no_grad()
def answer_ids(model, tokenizer, prompts: List[List[int]], max_new_tokens: int) -> List[List[int]]:
    """The token ids of the model's likeliest answers to `prompts` (token ids each), all at once.

    An answer that ended by itself has the end token in it. Padded on the left, so that every answer goes on right where
    its prompt ends.
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
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return output[:, longest:].tolist()


def answer_all(model, tokenizer, prompts: List[List[int]], max_new_tokens: int) -> List[str]:
    """The text of `answer_ids`, without the end token."""
    answers = answer_ids(model, tokenizer, prompts, max_new_tokens)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
