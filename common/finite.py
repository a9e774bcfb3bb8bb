"""Whether a training's numbers are still numbers: named with its step, without making a fast device wait."""

from __future__ import annotations

import math
from typing import Iterable, Optional

import torch

from common import UserError, processes


class Finite:
    """Looks at each step's loss and gradient norm: on a CPU at once, on a GPU when the next step's are under way.

    To read a number of the device's is to wait for it, in each step. So a copy to the main memory is only ordered, and
    is read a step later, when it has long been there.
    """

    def __init__(self, device: torch.device, scaled: bool):
        self.waits = device.type == "cuda"
        self.scaled = scaled  # the float16 scaler leaves out a step whose gradient overflows, which is no fault
        self.ordered: Optional[tuple] = None

    def look(self, step: int, loss: torch.Tensor, norm: torch.Tensor, at_once: bool = False) -> str:
        """What is not finite of `step`, where that can be said yet, or has to (`at_once`); else what `late` says."""
        problem = self.late()
        numbers = torch.stack([loss, torch.zeros_like(loss) if self.scaled else norm.detach()])
        if self.waits and not at_once:
            copy, arrived = torch.empty(2, pin_memory=True), torch.cuda.Event()
            copy.copy_(numbers, non_blocking=True)
            arrived.record()
            self.ordered = step, copy, arrived
            return problem
        return problem or _problem(step, numbers)

    def late(self) -> str:
        """What is not finite of the last step that has been looked at."""
        if self.ordered is None:
            return ""
        (step, numbers, arrived), self.ordered = self.ordered, None
        arrived.synchronize()
        return _problem(step, numbers)


def require_finite_weights(weights: Iterable[torch.Tensor]) -> None:
    """UserError where the last step has made weights that are no numbers: no loss has told of them yet."""
    own = (weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights)
    if processes.any_of(not all(bool(torch.isfinite(weight).all()) for weight in own)):
        raise UserError(
            "The training broke: weights are no numbers any more. Take a smaller --lr, or more --warmup-steps."
        )


def _problem(step: int, numbers: torch.Tensor) -> str:
    for name, number in zip(("loss", "gradient norm"), numbers.tolist()):
        if not math.isfinite(number):
            return f"The {name} of step {step} is {number}"
    return ""
