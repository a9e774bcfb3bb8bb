"""A trained model and the model before its training, which answer the same question."""

from __future__ import annotations

from contextlib import closing, nullcontext
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import nn

from common.device import Device
from common.support.model_dir import ModelSource
from model.generate import Answer, iterate_answer
from model.load import load_model

BASE, TRAINED = 0, 1


class Pair(NamedTuple):
    """Both models; with an adapter that is switched off for the base, they are one."""

    base: nn.Module
    trained: nn.Module
    as_base: Callable  # a context in which the base is asked

    def answer(
        self,
        tokenizer,
        prompts: Sequence[List[int]],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        ends: Sequence[int] = (),
    ) -> Iterator[Tuple[int, Answer]]:
        """(TRAINED, its answer so far) again and again, then the same of BASE: what is waited for comes first.

        prompts: the token ids for BASE, and for TRAINED. Closing the iterator stops the answer at its next token.
        """
        for side, model, context in ((TRAINED, self.trained, nullcontext), (BASE, self.base, self.as_base)):
            torch.manual_seed(seed)
            answers = iterate_answer(model, tokenizer, prompts[side], max_new_tokens, temperature, ends)
            with context(), closing(answers):
                for answer in answers:
                    yield side, answer


class Dialogue:
    """What somebody has asked a Pair, and its answers: all turns of a chat, else the last question alone.

    `talks`: the messages of BASE and of TRAINED. The content of an answer that has not begun is None.
    """

    def __init__(self):
        self.talks: List[List[dict]] = [[], []]
        self.stopped = False

    def stop(self) -> None:
        """End the answer under way, if there is one, at its next token."""
        self.stopped = True

    def ask(
        self, pair: Pair, asker, text: str, max_new_tokens: int, temperature: float, seed: int, system: str = ""
    ) -> Iterator[None]:
        """Ask both models. Yields after each token, which is in `talks` then.

        asker: of dataset.questions. system: a chat's system message. UserError for a question that cannot be asked.
        """
        self.stopped = False
        first = [{"role": "system", "content": system}] if system else []
        before = self.talks if asker.chat_template else [[], []]
        asked = [[*talk, {"role": "user", "content": text}] for talk in before]
        prompts = [asker.encode([*first, *talk], max_new_tokens) for talk in asked]
        texts: List[Optional[str]] = [None, None]
        answers = pair.answer(asker.tokenizer, prompts, max_new_tokens, temperature, seed, asker.ends)
        with closing(answers):
            for side, answer in answers:
                texts[side] = answer.text
                self.talks = [[*talk, {"role": "assistant", "content": new}] for talk, new in zip(asked, texts)]
                yield
                if self.stopped:
                    return


def load_pair(model_dir: str, base_dir: str, device: Device, bits: Optional[int] = None) -> Pair:
    """The pair of two directories. An adapter and its base model share one set of weights. bits: as in load_model."""
    source = ModelSource(model_dir)
    trained = load_model(model_dir, device.torch_device, device.dtype, bits)
    is_its_base = source.is_adapter and Path(source.base).resolve() == Path(base_dir).resolve()
    if is_its_base and source.leaves_base_unchanged:
        return Pair(trained, trained, trained.disable_adapter)
    if is_its_base and bits is None:
        bits = source.base_bits
    return Pair(load_model(base_dir, device.torch_device, device.dtype, bits), trained, nullcontext)
