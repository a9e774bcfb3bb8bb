"""The training loop that all tutorials share."""

from __future__ import annotations

import math
from time import perf_counter
from typing import List

import torch
from torch import nn

from common import UserError
from common.accelerator import Accelerator
from common.batching import Batches
from common.optimizer import learning_rate
from common.progress import TrainingLog, facts_of_run


def train(model: nn.Module, optimizer, dataset: dict, args, accelerator: Accelerator) -> dict:
    """Train on `dataset["train"]`; log and loss picture go to `args.save_dir`; returns what is to stand in run.json.

    `model(input_ids, labels, attention_mask)` is the sum of the loss over the label tokens. A step's loss is that sum
    over all micro-batches, divided by the label tokens of the whole batch: the loss, and so the gradients, of one
    padded batch, however it was split. The state of a training is step, weights, optimizer, scaler, random states and
    the sums of the log line under way; batches and learning rate follow from the step. UserError: no finite loss.
    """
    tokens = args.micro_batch_tokens or accelerator.micro_batch_tokens
    static_length = args.block_size if accelerator.static_shapes else 0
    batches = Batches(dataset["train"], args.batch_size, tokens, static_length, args.train_on_prompt)
    held_out = Batches(dataset["validation"], batches.batch_size, tokens, static_length, args.train_on_prompt)
    held_out_rows = list(range(min(args.eval_rows, len(held_out.lengths))))
    held_out_tokens = int(held_out.label_counts[held_out_rows].sum())
    if batches.batch_size < args.batch_size:
        rows = len(batches.lengths)
        print(f"--batch-size {args.batch_size} is more than the {rows} rows of the data: {rows} is used.")
    total_steps = args.max_train_steps or args.epochs * batches.steps_an_epoch
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    scaler = accelerator.gradient_scaler()
    print(accelerator.memory())

    with TrainingLog(args.save_dir, total_steps) as log, accelerator.room_for_training(model):
        if held_out_rows:
            log.held_out_loss(0, total_loss(model, held_out, held_out_rows, accelerator) / held_out_tokens)
        loss_sum = torch.zeros((), device=accelerator.device)  # of this log line, like the two counts
        label_tokens, all_tokens, start = 0, 0, perf_counter()
        model.train()
        for step in range(1, total_steps + 1):
            rows = batches.rows_of(step, args.seed)
            batch_label_tokens = int(batches.label_counts[rows].sum())
            for micro_batch in batches.of(rows):
                loss = forward(model, micro_batch, accelerator)
                scaler.scale(loss / batch_label_tokens).backward()
                loss_sum += loss.detach()
            scaler.unscale_(optimizer)
            if args.max_grad_norm:
                nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            lr = learning_rate(step, total_steps, args.lr, args.warmup_steps, args.lr_scheduler)
            for group in optimizer.param_groups:
                group["lr"] = lr
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            log.bar.update()
            label_tokens += batch_label_tokens
            all_tokens += int(batches.lengths[rows].sum())
            if step % args.log_interval == 0 or step == total_steps:
                accelerator.synchronize()  # the clock must not be read before the device has finished
                mean = loss_sum.item() / label_tokens
                log.training_loss(step, mean, perf_counter() - start, all_tokens, lr)
                if not math.isfinite(mean):
                    raise UserError(
                        f"The loss became {mean} by step {step}. Take a smaller --lr, or more --warmup-steps."
                    )
                loss_sum.zero_()
                label_tokens, all_tokens, start = 0, 0, perf_counter()
            if held_out_rows and (step == total_steps or (args.eval_step and step % args.eval_step == 0)):
                accelerator.synchronize()
                paused = perf_counter()
                log.held_out_loss(step, total_loss(model, held_out, held_out_rows, accelerator) / held_out_tokens)
                start += perf_counter() - paused
        log.draw()
    if not all(torch.isfinite(weight).all() for weight in trained):  # in the very last step
        raise UserError(
            "The training broke: weights are no numbers any more. Take a smaller --lr, or more --warmup-steps."
        )
    print(accelerator.memory())
    print("Training Done")
    return facts_of_run(vars(args), dataset["meta"], accelerator.name)


@torch.no_grad()
def total_loss(model: nn.Module, batches: Batches, rows: List[int], accelerator: Accelerator) -> float:
    """The loss over all label tokens of these rows, as in evaluation: without dropout, without gradients."""
    was_training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(rows), batches.batch_size):
        for micro_batch in batches.of(rows[start : start + batches.batch_size]):
            total += forward(model, micro_batch, accelerator).item()
    model.train(was_training)
    return total


def forward(model: nn.Module, micro_batch, accelerator: Accelerator) -> torch.Tensor:
    """The sum of the loss over the label tokens of a micro-batch, float32 []."""
    on_device = [None if tensor is None else tensor.to(accelerator.device) for tensor in micro_batch]
    with accelerator.autocast():
        return model(*on_device)
