"""The training loop that all tutorials share: read `train_step` first, then `train`."""

from __future__ import annotations

import contextlib
import math
import sys
from dataclasses import asdict, dataclass, field
from typing import Callable, List, Optional

import torch
from torch import nn

from common import distributed
from common.batches import Batches, MicroBatch
from common.checkpoint import Checkpoint, Checkpoints, restore, training_tensors
from common.device import Device, explain_out_of_memory, memory_used, reset_peak
from common.optim import clip_gradients, learning_rate
from common.support.cli import memory_saving_options
from common.support.exit import Stopped, StopRequest, UserError, is_out_of_memory
from common.train_log import Clock, TrainLog, round_number, run_facts


def train(model, optimizer, dataset: dict, args, plan, device: Device, resume: Optional[Checkpoint] = None) -> dict:
    """Train `model` on `dataset["train"]`, and return what run.json is to say of it.

    `model` takes the fields of a MicroBatch and returns the loss, summed over the label tokens. The log and the picture
    of the losses go to `args.save_dir`. `plan` says how large micro-batches are; `resume` is the checkpoint of an
    interrupted run. After Ctrl-C or SIGTERM a checkpoint of the last finished step is written and SystemExit is raised.
    Raises UserError where the loss or a weight becomes NaN or infinite, or where the memory is too small.
    """
    trainer = Trainer(model, optimizer, dataset, args, plan, device, resume)
    print(device.memory_line())
    options = memory_saving_options(args)
    with trainer.stop_request, explain_out_of_memory("the training", device.torch_device, options):
        try:
            with trainer.log:
                trainer.run()
        except Stopped:
            trainer.save_and_exit()
    print(device.memory_line())
    if plan.prediction:
        print(plan.prediction.compare_with_measured(memory_used(device.torch_device)[1]))
    print("Training Done")
    return trainer.summary()


@dataclass
class TrainState:
    """How far a training has come, besides its tensors. A checkpoint holds all of it."""

    step: int = 0  # the last finished one
    logged: bool = False  # whether the log line and the held-out loss of that step are written
    loss_sum: float = 0.0  # of the log line under way, like the next three
    num_labels: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0  # steps without a finite loss or gradient
    micro_batch_tokens: int = 0
    gradient_checkpointing: bool = False
    best_step: int = 0  # that of the lowest held-out loss, with --keep-best
    best_loss: float = math.inf
    records: List[dict] = field(default_factory=list)  # the lines of training_log.jsonl


class Trainer:
    """A training, step by step. Batches and learning rate follow from the step; all else that changes is `state`, the
    parameters, the optimizer, the gradient scaler and the random states."""

    def __init__(self, model, optimizer, dataset: dict, args, plan, device: Device, resume: Optional[Checkpoint]):
        self.model = model
        self.optimizer = optimizer
        self.dataset = dataset
        self.args = args
        self.device = device
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.scaler = device.gradient_scaler()
        options = {
            "micro_batch_tokens": plan.micro_batch_tokens,
            "static_length": args.block_size if device.static_shapes else 0,
            "train_on_prompt": args.train_on_prompt,
            "packed": device.packs and model.enable_packing(args.block_size),
        }
        self.batches = Batches(dataset["train"], args.batch_size, **options)
        self.eval_batches = Batches(dataset["validation"], self.batches.batch_size, **options)
        self.eval_rows = list(range(min(args.eval_rows, len(self.eval_batches.lengths))))
        if self.batches.batch_size < args.batch_size:
            rows = len(self.batches.lengths)
            print(f"--batch-size {args.batch_size} exceeds the {rows} training rows; using {rows}.")
        self.total_steps = args.max_train_steps or args.epochs * self.batches.steps_per_epoch

        self.checkpoints = Checkpoints(args, resume, model, optimizer, device, dataset["sha256"], self.total_steps)
        if resume:
            restore(resume, model, optimizer, self.scaler, device)
        if distributed.rank() >= (resume.metadata["processes"] if resume else 1):
            # Each rank has its own dropout.
            torch.manual_seed(args.seed + 1_000_003 * distributed.rank() + (resume.state["step"] if resume else 0))
        self.state = TrainState(**(resume.state if resume else {}))
        self.state.micro_batch_tokens = plan.micro_batch_tokens
        self.state.gradient_checkpointing = plan.gradient_checkpointing
        self.loss_sum = torch.tensor(self.state.loss_sum, device=device.torch_device)
        self.random_states = device.random_states()  # as the last finished step has left them
        self.interval_is_over = False
        self.stop_request = StopRequest()
        self.clock = Clock(device, self.state.seconds)
        self.log = TrainLog(args.save_dir, self.total_steps, self.state.step, self.state.records, args.report_to)
        reset_peak(device.torch_device)

    def run(self) -> None:
        """All steps, with their log lines and checkpoints. Raises Stopped where the training was asked to stop."""
        self.model.train()
        while True:
            if not self.state.logged:
                self.log_and_evaluate()
            if self.checkpoints.is_due(self.state.step, self.interval_is_over):
                self.save_checkpoint()
            self.check_stop()
            if self.state.step == self.total_steps:
                break
            self.train_step()
        self.check_finite()
        best = self.state.best_step
        if best and self.checkpoints.load_parameters_of_step(best, self.model):
            self.log.best(best, self.state.best_loss)
        self.log.draw()

    def train_step(self) -> None:
        """One optimizer step on `batch_size` rows, in micro-batches of at most `micro_batch_tokens` tokens."""
        step = self.state.step + 1
        rows = self.batches.rows_for_step(step, self.args.seed)
        loss_sum = self.backward(rows)
        while loss_sum is None:  # out of memory: the micro-batches are smaller now
            self.discard_step()
            loss_sum = self.backward(rows)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.args.max_grad_norm)
        num_labels = self.batches.num_labels(rows)
        if self.must_skip(step, loss_sum / num_labels, norm):
            self.state.skipped += 1
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            self.scaler.step(self.optimizer)
            self.loss_sum += loss_sum
            self.state.num_labels += num_labels
            self.state.num_tokens += self.batches.num_tokens(rows)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.random_states = self.device.random_states()
        self.state.step = step
        self.state.logged = False
        self.log.bar.update()

    def backward(self, rows: List[int]) -> Optional[torch.Tensor]:
        """Add the gradients of the mean loss of these rows; the sum of their loss, float32 [].

        The loss of each micro-batch is divided by the label tokens of the whole batch, over all micro-batches and
        ranks. So the gradients are those of one padded batch, however it was split. None where the memory was full.
        """
        num_labels = self.batches.num_labels(rows)
        loss_sum = torch.zeros((), device=self.device.torch_device)
        try:
            for micro_batch in self.batches.micro_batches(rows):
                loss = forward(self.model, micro_batch, self.device)
                # FSDP averages gradients over ranks, but the loss is a sum: multiply by world_size.
                self.scaler.scale(loss * distributed.world_size() / num_labels).backward()
                loss_sum += loss.detach()
                self.check_stop()
            distributed.average_gradients(self.parameters)
            return distributed.all_reduce_sum(loss_sum)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not self.batches.halve_micro_batches(rows):
                raise
        tokens = self.batches.micro_batch_tokens
        if distributed.world_size() > 1:  # the other ranks wait where this one has left them
            raise UserError(
                f"Rank {distributed.rank()} is out of memory. Run the same command again with "
                f"--micro-batch-tokens {tokens}."
            )
        self.state.micro_batch_tokens = tokens
        self.eval_batches.micro_batch_tokens = tokens
        self.log.write_line(f"Out of memory: micro-batches reduced to {tokens} tokens.")
        return None

    def must_skip(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Whether --skip-nonfinite skips this step, because its loss or its gradient is NaN or infinite.

        Only then are the numbers of each step read, which makes a GPU wait. Without the option, NaN is found where a
        loss is logged and before each checkpoint.
        """
        if not self.args.skip_nonfinite:
            return False
        values = {"loss": loss.item()}
        if not self.scaler.is_enabled():  # the float16 scaler skips a step whose gradient overflows by itself
            values["gradient norm"] = norm.item()
        problem = next((f"The {name} is {value}" for name, value in values.items() if not math.isfinite(value)), "")
        if problem and self.state.skipped == self.args.skip_nonfinite:
            self.fail(f"{problem} at step {step}")
        if problem:
            self.log.skipped(step, problem)
        return bool(problem)

    def log_and_evaluate(self) -> None:
        """The log line and the held-out loss of the last finished step, where they are due."""
        step = self.state.step
        is_last = step == self.total_steps
        eval_loss = None
        if self.eval_rows and (step == 0 or is_last or (self.args.eval_step and step % self.args.eval_step == 0)):
            eval_loss = self.evaluate()
        # No stop check below: a line that was printed must not be printed again after a resume.
        if self.state.num_labels and (step % self.args.log_interval == 0 or is_last):
            self.log_train_loss()
        if eval_loss is not None:
            self.log.log_eval(step, eval_loss)
        self.state.logged = True
        if self.args.keep_best and step and eval_loss is not None and eval_loss < self.state.best_loss:
            before = (self.state.best_step, self.state.best_loss)
            self.state.best_step = step
            self.state.best_loss = eval_loss
            if not self.save_checkpoint():
                self.state.best_step, self.state.best_loss = before

    def evaluate(self) -> float:
        """The mean loss of a label token of the held-out rows. The clock of the log line stands still."""
        with self.clock.paused():
            total = total_loss(self.model, self.eval_batches, self.eval_rows, self.device, self.check_stop)
        return total / self.eval_batches.num_labels(self.eval_rows)

    def log_train_loss(self) -> None:
        """Write the mean loss since the last log line, and begin the next one."""
        step = self.state.step
        loss = self.loss_sum.item() / self.state.num_labels
        if not math.isfinite(loss):
            self.fail(f"The loss is {loss} at step {step}")
        self.log.log_train(step, loss, self.clock.seconds(), self.state.num_tokens, self.learning_rate(step))
        self.loss_sum.zero_()
        self.state.num_labels = 0
        self.state.num_tokens = 0
        self.clock.restart()

    def save_checkpoint(self) -> bool:
        """Write a checkpoint; False where the disk is full. UserError, and the last one stays, after a NaN."""
        with self.clock.paused():
            self.check_finite()
            self.state.loss_sum = self.loss_sum.item()
            self.state.seconds = self.clock.seconds()
            tensors = training_tensors(self.model, self.optimizer, self.device)
            scaler = self.scaler.state_dict()
            return self.checkpoints.save(tensors, asdict(self.state), scaler, self.stop_request, self.log.write_line)

    def save_and_exit(self) -> None:
        """After a stop request: write a checkpoint of the last finished step, and raise SystemExit."""
        self.discard_step()
        step = self.state.step
        checkpoints = self.checkpoints
        if step and checkpoints.enabled and (checkpoints.is_written(step) or self.save_checkpoint()):
            line = f"Stopped after step {step}; checkpoint saved in {checkpoints.own()[0]}. "
            line += "Run the same command to resume."
        elif checkpoints.own():
            line = f"Stopped. Run the same command to resume from {checkpoints.own()[0]}."
        else:
            line = "Stopped; nothing was saved."
        print(f"\n{line}", file=sys.stderr)
        sys.exit(128 + self.stop_request.number)

    def check_stop(self) -> None:
        """Raise Stopped where any rank was asked to stop; and ask all ranks whether the next checkpoint is due."""
        flags = [self.stop_request.number, self.checkpoints.minutes_are_over()]
        number, interval_is_over = distributed.all_reduce_max(flags)
        self.interval_is_over = bool(interval_is_over)
        if number:  # not otherwise: a signal that came after `flags` were read must not be lost
            self.stop_request.number = int(number)
            raise Stopped

    def discard_step(self) -> None:
        """Undo the step under way, which has changed no parameter yet."""
        self.optimizer.zero_grad(set_to_none=True)
        self.device.set_random_states(self.random_states)
        self.device.release_memory()

    def check_finite(self) -> None:
        """UserError where a parameter is NaN or infinite."""
        local = (p.to_local() if hasattr(p, "to_local") else p for p in self.parameters)
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in local)
        if distributed.any_rank(not finite):
            self.fail("Training diverged: the weights contain NaN or infinite values")

    def fail(self, problem: str) -> None:
        """Raise UserError with `problem` and what to do next."""
        own = self.checkpoints.own()
        restart = f" and --restart ({own[0]} is from before it)" if own else ""
        raise UserError(
            f"{problem}. Try a smaller --lr or more --warmup-steps{restart}. If a single bad batch is the cause, "
            "--skip-nonfinite 1 skips it."
        )

    def learning_rate(self, step: int) -> float:
        """The learning rate of `step`, from 1."""
        return learning_rate(step, self.total_steps, self.args.lr, self.args.warmup_steps, self.args.lr_scheduler)

    def summary(self) -> dict:
        """What run.json says of this run: command, options, data, versions, steps, and the held-out loss."""
        options = dict(vars(self.args))
        options["micro_batch_tokens"] = self.state.micro_batch_tokens
        options["gradient_checkpointing"] = self.state.gradient_checkpointing
        options["bits"] = self.model.bits
        run = run_facts(options, self.dataset["meta"], self.device.name)
        run["steps"] = self.total_steps
        eval_losses = [record["held_out_loss"] for record in self.log.records if "held_out_loss" in record]
        if eval_losses:
            after = round_number(self.state.best_loss) if self.state.best_step else eval_losses[-1]
            run["held_out_loss"] = {"before": eval_losses[0], "after": after, "rows": len(self.eval_rows)}
        return run


def forward(model: nn.Module, micro_batch: MicroBatch, device: Device) -> torch.Tensor:
    """The loss of a micro-batch, summed over its label tokens, float32 []."""
    micro_batch = micro_batch.to(device.torch_device)
    with device.autocast():
        return model(**micro_batch._asdict())


def total_loss(
    model: nn.Module, batches: Batches, rows: List[int], device: Device, after_micro_batch: Callable = lambda: None
) -> float:
    """The loss of these rows, summed over their label tokens, without dropout. With several ranks, the sum of all."""
    total = torch.zeros((), dtype=torch.float64, device=device.torch_device)
    with eval_mode(model):
        for start in range(0, len(rows), batches.batch_size):
            for micro_batch in batches.micro_batches(rows[start : start + batches.batch_size]):
                total += forward(model, micro_batch, device)
                after_micro_batch()
    return distributed.all_reduce_sum(total).item()


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """Inside, the model is without dropout and without gradients; afterwards it is as it was before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
