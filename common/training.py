"""The training loop that all tutorials share."""

from __future__ import annotations

import math
from time import perf_counter

import torch
from torch import nn

from common import UserError
from common.accelerator import Accelerator
from common.batching import global_batches, label_counts, micro_batches, row_lengths, static_batch
from common.progress import TrainingLog


def make_optimizer(model: nn.Module, args, accelerator: Accelerator) -> torch.optim.Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101) over the trainable weights; norms and biases don't decay.

    On a quantized base its states are in 8 bit (https://arxiv.org/abs/2110.02861), where bitsandbytes has that.
    """
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trainable if weight.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [weight for weight in trainable if weight.dim() < 2], "weight_decay": 0.0},
    ]
    if args.bits and (adamw8bit := _adamw8bit(accelerator.device)):
        return adamw8bit(groups, lr=args.lr)
    fused = not accelerator.static_shapes and _has_fused_adamw(accelerator.device)
    return torch.optim.AdamW(groups, lr=args.lr, **({"fused": True} if fused else {}))


def _has_fused_adamw(device: torch.device) -> bool:
    """Whether one kernel can update all weights: since torch 2.0 on CUDA, 2.4 on CPU; an older one tells in a step."""
    weight = torch.zeros(1, device=device, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    try:
        torch.optim.AdamW([weight], fused=True).step()
    except (TypeError, RuntimeError):
        return False
    return True


def _adamw8bit(device: torch.device):
    """The class of bitsandbytes, or None where it can't make a step on this device: older ones can't on a CPU."""
    from bitsandbytes.optim import AdamW8bit

    weight = torch.zeros(4096, device=device, requires_grad=True)  # smaller ones have states in 32 bit
    weight.grad = torch.zeros_like(weight)
    try:
        AdamW8bit([weight]).step()
    except Exception:  # by version an AttributeError, a NotImplementedError, a RuntimeError, ...
        return None
    return AdamW8bit


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """What the learning rate is multiplied by in `step` (from 0): it rises in the warm-up, then stays, or falls
    towards 0 along a line or a half cosine (https://arxiv.org/abs/1608.03983)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]


class Batches:
    """The batches of a split, as the device wants them: micro-batches, or one static shape."""

    def __init__(self, split: dict, args, batch_size: int, accelerator: Accelerator):
        self.split, self.args, self.batch_size, self.accelerator = split, args, batch_size, accelerator
        self.lengths = row_lengths(split)
        self.labels = label_counts(split, args.train_on_prompt)

    def of(self, rows: list) -> list:
        """The micro-batches of these rows."""
        on_prompt = self.args.train_on_prompt
        if self.accelerator.static_shapes:
            return static_batch(self.split, rows, self.batch_size, self.args.block_size, on_prompt)
        tokens = self.args.micro_batch_tokens or self.accelerator.micro_batch_tokens
        return micro_batches(self.split, rows, tokens, on_prompt)


def train(loss_module: nn.Module, optimizer, dataset: dict, args, accelerator: Accelerator) -> None:
    """Train on `dataset["train"]`; log, and at the end the loss picture, go to `args.save_dir`.

    `loss_module(input_ids, labels, attention_mask)` is the sum of the loss over the label tokens. A step's loss is
    that sum over all micro-batches, divided by the label tokens of the whole batch: the loss, and so the gradients,
    of one padded batch, however it was split. UserError where the loss is not a number.
    """
    rows = len(dataset["train"]["answer_starts"])
    batch_size = min(args.batch_size, rows)
    if batch_size < args.batch_size:
        print(f"--batch-size {args.batch_size} is more than the {rows} rows of the data: {batch_size} is used.")
    steps_an_epoch = rows // batch_size
    total_steps = args.max_train_steps or args.epochs * steps_an_epoch
    batches = Batches(dataset["train"], args, batch_size, accelerator)
    held_out = Batches(dataset["validation"], args, batch_size, accelerator)

    scaler = accelerator.gradient_scaler()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total_steps, args.warmup_steps, args.lr_scheduler)
    )
    print(accelerator.memory())
    with TrainingLog(args.save_dir, total_steps) as log:
        evaluate(loss_module, held_out, log, 0)
        loss_sum = torch.zeros((), device=accelerator.device)
        labels, tokens, start = 0, 0, perf_counter()
        loss_module.train()
        for step in range(1, total_steps + 1):
            epoch, place = divmod(step - 1, steps_an_epoch)
            if place == 0:
                order = global_batches(rows, batch_size, args.seed, epoch)
            batch = order[place]
            batch_labels = int(batches.labels[batch].sum())
            for micro_batch in batches.of(batch):
                loss = _forward(loss_module, micro_batch, accelerator)
                scaler.scale(loss / batch_labels).backward()
                loss_sum += loss.detach()
            scaler.unscale_(optimizer)
            if args.max_grad_norm:
                nn.utils.clip_grad_norm_(loss_module.parameters(), args.max_grad_norm)
            lr = schedule.get_last_lr()[0]
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)

            log.step()
            labels += batch_labels
            tokens += int(batches.lengths[batch].sum())
            if step % args.log_interval == 0 or step == total_steps:
                accelerator.synchronize()  # the clock must not be read before the device has finished
                mean = loss_sum.item() / labels
                log.train(step, mean, perf_counter() - start, tokens, lr)
                if not math.isfinite(mean):
                    raise UserError(
                        f"The loss became {mean} by step {step}. Take a smaller --lr, or more --warmup-steps."
                    )
                loss_sum.zero_()
                labels, tokens, start = 0, 0, perf_counter()
            if step == total_steps or (args.eval_step and step % args.eval_step == 0):
                accelerator.synchronize()
                paused = perf_counter()
                evaluate(loss_module, held_out, log, step)
                start += perf_counter() - paused
    trained = [weight for weight in loss_module.parameters() if weight.requires_grad]
    if not all(torch.isfinite(weight).all() for weight in trained):  # in the very last step
        raise UserError(
            "The training broke: weights are no numbers any more. Take a smaller --lr, or more --warmup-steps."
        )
    print(accelerator.memory())
    print("Training Done")
    log.finish(vars(args), dataset["meta"], accelerator.name)


def evaluate(loss_module: nn.Module, held_out: Batches, log: TrainingLog, step: int) -> None:
    """Log the mean loss over the label tokens of the first `args.eval_rows` held-out rows, where there are any."""
    rows = list(range(min(held_out.args.eval_rows, len(held_out.lengths))))
    if rows:
        log.held_out(step, total_loss(loss_module, held_out, rows) / int(held_out.labels[rows].sum()))


@torch.no_grad()
def total_loss(loss_module: nn.Module, batches: Batches, rows: list) -> float:
    """The loss over all label tokens of these rows, as in evaluation: without dropout, without gradients."""
    was_training = loss_module.training
    loss_module.eval()
    total = 0.0
    for start in range(0, len(rows), batches.batch_size):
        for micro_batch in batches.of(rows[start : start + batches.batch_size]):
            total += _forward(loss_module, micro_batch, batches.accelerator).item()
    loss_module.train(was_training)
    return total


def _forward(loss_module: nn.Module, micro_batch, accelerator: Accelerator) -> torch.Tensor:
    on_device = [None if tensor is None else tensor.to(accelerator.device) for tensor in micro_batch]
    with accelerator.autocast():
        return loss_module(*on_device)
