"""The loss of micro-batches, and of rows that are held out."""

from __future__ import annotations

import contextlib
import math
from typing import Iterable, List, Optional

import torch
from torch import nn

from common import distributed
from common.batches import Batches
from common.checkpoint import Checkpoints, State, begin_again_with
from common.device import Device, explain_out_of_memory, memory_used, reset_peak
from common.optim import clip_gradients, learning_rate
from common.support.cli import memory_saving_options
from common.support.exit import Stopped, StopRequest, UserError, is_out_of_memory
from common.train_log import Clock, TrainLog, run_facts


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """Inside, the model is in evaluation: without dropout, without gradients. Whatever comes, it is as before after."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def total_loss(model: nn.Module, batches: Batches, rows: List[int], device, after_each=lambda: None) -> float:
    """The loss over all label tokens of these rows, in evaluation. `after_each` micro-batch something is called, which
    may raise. Of several processes each takes its share of the rows, and all get the sum."""
    total = 0.0
    with eval_mode(model):
        for start in range(0, len(rows), batches.batch_size):
            for micro_batch in batches.of(rows[start : start + batches.batch_size]):
                total += forward(model, micro_batch, device).item()
                after_each()
    return distributed.all_reduce_sum(torch.tensor(total, dtype=torch.float64)).item()


def forward(model: nn.Module, micro_batch, device: Device) -> torch.Tensor:
    """The sum of the loss over the label tokens of a micro-batch, float32 []."""
    on_device = [None if tensor is None else tensor.to(device.torch_device) for tensor in micro_batch]
    with device.autocast():
        return model(*on_device)


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
    if distributed.any_rank(not all(bool(torch.isfinite(weight).all()) for weight in own)):
        raise UserError(
            "The training broke: weights are no numbers any more. Take a smaller --lr, or more --warmup-steps."
        )


def _problem(step: int, numbers: torch.Tensor) -> str:
    for name, number in zip(("loss", "gradient norm"), numbers.tolist()):
        if not math.isfinite(number):
            return f"The {name} of step {step} is {number}"
    return ""


def train(model, optimizer, dataset: dict, args, device: Device, checkpoints: Checkpoints, plan=None) -> dict:
    """Train on `dataset["train"]`; log and loss picture go to `args.save_dir`; returns what is to stand in run.json.

    `model(input_ids, labels, attention_mask)` is the sum of the loss over the label tokens. Where `checkpoints` has one
    of a run that was cut, the training goes on from it. SystemExit, with a checkpoint of the last finished step, where
    Ctrl-C or SIGTERM comes; UserError where a loss, a gradient or a weight is no number any more. `plan`:
    what model.plan has predicted, to be compared.
    """
    training = Training(model, optimizer, dataset, args, device, checkpoints)
    state = training.state
    print(device.memory_line())
    reset_peak(device.torch_device)
    needed = _training_state_bytes(training.trained, model)
    room = "weights, gradients and optimizer states", needed, device.torch_device, memory_saving_options(args)
    with training.stop:
        try:
            with training.log as log, explain_out_of_memory(*room):
                model.train()
                while True:
                    if not state.reported:
                        training.report()
                    if checkpoints.due(state):
                        training.write_checkpoint()
                    training.check_stop()
                    if state.step == training.total_steps:
                        break
                    training.step()
                training.require_numbers()  # which the very last step may have broken
                if args.keep_best and state.best_step and checkpoints.take_weights_of(state.best_step):
                    log.best(state.best_step, state.best_loss)
                log.draw()
        except Stopped:
            training.drop_step()
            training.require_numbers()
            checkpoints.leave(training.up_to_date(), training.stop)
    print(device.memory_line())
    if plan:
        print(plan.compared(memory_used(device.torch_device)[1]))
    print("Training Done")
    options = {**vars(args), "micro_batch_tokens": state.micro_batch_tokens}
    return {**run_facts(options, dataset["meta"], device.name), **training.measured()}


def _training_state_bytes(trained: List[torch.Tensor], model: nn.Module) -> int:
    """Bytes of the weights of this rank, and for the trained ones of their gradients and AdamW's states in float32."""

    def numel(weight):
        return weight.to_local().numel() if hasattr(weight, "to_local") else weight.numel()

    weights = sum(numel(weight) * weight.element_size() for weight in model.parameters())
    return weights + sum(numel(weight) * (weight.element_size() + 8) for weight in trained)


class Training:
    """A training, step by step.

    Its state is `state` (step, and the sums of the log line under way), weights, optimizer, scaler and random states;
    batches and learning rate follow from the step.
    """

    def __init__(self, model, optimizer, dataset: dict, args, device: Device, checkpoints: Checkpoints):
        self.model, self.optimizer, self.checkpoints = model, optimizer, checkpoints
        self.args, self.device = args, device
        # what makes a CPU faster: rows without padding, and the same memory for each micro-batch's largest pieces
        packed = device.packs and model.let_pack(args.block_size)
        model.reused.on = device.packs and distributed.world_size() == 1
        shape = 0, args.block_size if device.static_shapes else 0, args.train_on_prompt, packed
        self.batches = Batches(dataset["train"], args.batch_size, *shape)
        self.held_out = Batches(dataset["validation"], self.batches.batch_size, *shape)
        self.held_out_rows = list(range(min(args.eval_rows, len(self.held_out.lengths))))
        if self.batches.batch_size < args.batch_size:
            rows = len(self.batches.lengths)
            print(f"--batch-size {args.batch_size} is more than the {rows} rows of the data: {rows} is used.")
        self.total_steps = args.max_train_steps or args.epochs * self.batches.steps_an_epoch
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.scaler = device.gradient_scaler()
        self.state = checkpoints.begin(model, optimizer, self.scaler, device, self.total_steps, dataset["sha256"])
        self.batches.micro_batch_tokens = self.held_out.micro_batch_tokens = self.state.micro_batch_tokens
        self.stop, self.clock = StopRequest(), Clock(device, self.state.seconds)
        self.random = device.random_states()  # as the last finished step has left them
        self.loss_sum = torch.tensor(self.state.loss_sum, device=device.torch_device)
        self.finite = Finite(device.torch_device, self.scaler.is_enabled())
        of_log = args.save_dir, self.total_steps, self.state.step, self.state.records
        self.log = TrainLog(*of_log, args.report_to)

    def step(self) -> None:
        """One optimizer step. Its loss is the sum over all micro-batches, divided by the label tokens of the whole
        batch: the loss, and so the gradients, of one padded batch, however it was split."""
        args, state, number = self.args, self.state, self.state.step + 1
        rows = self.batches.rows_for_step(number, args.seed)
        label_tokens = int(self.batches.label_counts[rows].sum())
        loss_sum = self.gradients(rows, label_tokens)
        while loss_sum is None:  # the memory was too small, the micro-batches are smaller now
            self.drop_step()
            loss_sum = self.gradients(rows, label_tokens)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.trained, args.max_grad_norm)
        may_skip = state.skipped < args.skip_nonfinite
        problem = self.finite.look(number, loss_sum / label_tokens, norm, at_once=may_skip)
        if problem:
            self.end_at("" if may_skip else problem)
            state.skipped += 1
            self.log.skipped(number, problem)
        else:
            lr = learning_rate(number, self.total_steps, args.lr, args.warmup_steps, args.lr_scheduler)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.scaler.step(self.optimizer)
            self.loss_sum += loss_sum
            state.label_tokens += label_tokens
            state.tokens += int(self.batches.lengths[rows].sum())
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.random = self.device.random_states()
        state.step, state.reported = number, False
        self.log.bar.update()

    def gradients(self, rows: List[int], label_tokens: int) -> Optional[torch.Tensor]:
        """Add the gradients of these rows' mean loss to the weights'; the sum of the loss, float32 []. None where the
        memory was full: some gradients may be there, and the micro-batches will be smaller."""
        total = torch.zeros((), device=self.device.torch_device)
        try:
            for micro_batch in self.batches.of(rows):
                loss = forward(self.model, micro_batch, self.device)
                # of several processes the mean gradient is taken, and theirs are parts of one sum
                self.scaler.scale(loss * distributed.world_size() / label_tokens).backward()
                total += loss.detach()
                self.check_stop()
            distributed.average_gradients(self.trained)
            return distributed.all_reduce_sum(total)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not self.batches.halve_micro_batches(rows):  # each row is alone already
                raise
        tokens = self.state.micro_batch_tokens = self.held_out.micro_batch_tokens = self.batches.micro_batch_tokens
        if distributed.world_size() > 1:  # the others wait where this one has left them
            begin_again_with(tokens, self.args)
        self.log.write_line(f"The memory is full: from here on --micro-batch-tokens is {tokens}.")
        return None

    def report(self) -> None:
        """The log line and the held-out loss of the step that is finished, where they are due."""
        args, state, step, last = self.args, self.state, self.state.step, self.state.step == self.total_steps
        held_out = None
        if self.held_out_rows and (step == 0 or last or (args.eval_step and step % args.eval_step == 0)):
            with self.clock.paused():
                total = total_loss(self.model, self.held_out, self.held_out_rows, self.device, self.check_stop)
                held_out = total / int(self.held_out.label_counts[self.held_out_rows].sum())
        # from here to the end nothing stops it: what has been told is not told again
        if state.label_tokens and (step % args.log_interval == 0 or last):
            loss = self.loss_sum.item() / state.label_tokens
            self.end_at(self.finite.late())
            lr = learning_rate(step, self.total_steps, args.lr, args.warmup_steps, args.lr_scheduler)
            self.log.log_train(step, loss, self.clock.seconds(), state.tokens, lr)
            self.loss_sum.zero_()
            state.label_tokens, state.tokens = 0, 0
            self.clock.restart()
        if held_out is not None:
            self.log.log_eval(step, held_out)
        state.reported = True
        if args.keep_best and step and held_out is not None and (state.best_loss is None or held_out < state.best_loss):
            before = state.best_step, state.best_loss
            state.best_step, state.best_loss = step, held_out
            if not self.write_checkpoint():
                state.best_step, state.best_loss = before

    def write_checkpoint(self) -> bool:
        """Whether there is one now; of numbers only, so that the one before stays where the training has broken."""
        with self.clock.paused():
            self.require_numbers()
            return self.checkpoints.write(self.up_to_date(), self.stop)

    def check_stop(self) -> None:
        """Raise Stopped where any rank was asked to stop."""
        self.stop.number = int(distributed.all_reduce_max([self.stop.number])[0])
        if self.stop.number:
            raise Stopped

    def require_numbers(self) -> None:
        self.end_at(self.finite.late())
        require_finite_weights(self.trained)

    def drop_step(self) -> None:
        """As if the step under way had not been begun."""
        self.optimizer.zero_grad(set_to_none=True)
        self.device.set_random_states(self.random)
        self.device.release_memory()

    def up_to_date(self) -> State:
        """The state with what the loop keeps elsewhere: a tensor on the device, a clock that runs."""
        self.state.loss_sum, self.state.seconds = self.loss_sum.item(), self.clock.seconds()
        return self.state

    def measured(self) -> dict:
        """For run.json: the steps, and the held-out loss before the first and of the weights that are saved."""
        found = [record["held_out_loss"] for record in self.log.records if "held_out_loss" in record]
        best = [record["best_held_out_loss"] for record in self.log.records if "best_held_out_loss" in record]
        losses = {"before": found[0], "after": (found + best)[-1], "rows": len(self.held_out_rows)} if found else {}
        return {"steps": self.total_steps, **({"held_out_loss": losses} if losses else {})}

    def end_at(self, problem: str) -> None:
        """UserError where there is a problem, with what is left."""
        if not problem:
            return
        kept = self.checkpoints.kept
        anew = f" and --restart ({kept[0]} is from before it)" if kept else ""
        raise UserError(
            f"{problem}. Take a smaller --lr, or more --warmup-steps{anew}. Where one strange row breaks a step, "
            "--skip-nonfinite 1 leaves it out."
        )
