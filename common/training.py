"""The training loop that all tutorials share."""

from __future__ import annotations

from typing import List, Optional

import torch

from common import UserError, is_out_of_memory, less_memory, losses, processes
from common.accelerator import Accelerator
from common.batching import Batches
from common.checkpoints import Checkpoints
from common.curves import CurvesToo
from common.finite import Finite, require_finite_weights
from common.memory import memory_used
from common.optimizer import clip_gradients, learning_rate
from common.progress import Clock, TrainingLog, facts_of_run
from common.state import State, begin_again_with
from common.stopping import Stopped, StopRequest


def train(model, optimizer, dataset: dict, args, accelerator: Accelerator, checkpoints: Checkpoints, plan=None) -> dict:
    """Train on `dataset["train"]`; log and loss picture go to `args.save_dir`; returns what is to stand in run.json.

    `model(input_ids, labels, attention_mask)` is the sum of the loss over the label tokens. Where `checkpoints` has one
    of a run that was cut, the training goes on from it. SystemExit, with a checkpoint of the last finished step, where
    Ctrl-C or SIGTERM comes; UserError where a loss, a gradient or a weight is no number any more. `plan`:
    what model.plan has predicted, to be compared.
    """
    training = Training(model, optimizer, dataset, args, accelerator, checkpoints)
    state = training.state
    print(accelerator.memory())
    with training.stop:
        try:
            with training.log as log, accelerator.room_for_training(model):
                model.train()
                while True:
                    if not state.reported:
                        training.report()
                    if checkpoints.due(state):
                        training.write_checkpoint()
                    training.stop.check()
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
    print(accelerator.memory())
    if plan:
        print(plan.compared(memory_used(accelerator.device)[1]))
    print("Training Done")
    options = {**vars(args), "micro_batch_tokens": state.micro_batch_tokens}
    return {**facts_of_run(options, dataset["meta"], accelerator.name), **training.measured()}


class Training:
    """A training, step by step.

    Its state is `state` (step, and the sums of the log line under way), weights, optimizer, scaler and random states;
    batches and learning rate follow from the step.
    """

    def __init__(self, model, optimizer, dataset: dict, args, accelerator: Accelerator, checkpoints: Checkpoints):
        self.model, self.optimizer, self.checkpoints = model, optimizer, checkpoints
        self.args, self.accelerator = args, accelerator
        # what makes a CPU faster: rows without padding, and the same memory for each micro-batch's largest pieces
        packed = accelerator.packs and model.let_pack(args.block_size)
        model.reused.on = accelerator.packs and processes.count() == 1
        shape = 0, args.block_size if accelerator.static_shapes else 0, args.train_on_prompt, packed
        self.batches = Batches(dataset["train"], args.batch_size, *shape)
        self.held_out = Batches(dataset["validation"], self.batches.batch_size, *shape)
        self.held_out_rows = list(range(min(args.eval_rows, len(self.held_out.lengths))))
        if self.batches.batch_size < args.batch_size:
            rows = len(self.batches.lengths)
            print(f"--batch-size {args.batch_size} is more than the {rows} rows of the data: {rows} is used.")
        self.total_steps = args.max_train_steps or args.epochs * self.batches.steps_an_epoch
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.scaler = accelerator.gradient_scaler()
        self.state = checkpoints.begin(model, optimizer, self.scaler, accelerator, self.total_steps, dataset["sha256"])
        self.batches.micro_batch_tokens = self.held_out.micro_batch_tokens = self.state.micro_batch_tokens
        self.stop, self.clock = StopRequest(), Clock(accelerator, self.state.seconds)
        self.random = accelerator.random_states()  # as the last finished step has left them
        self.loss_sum = torch.tensor(self.state.loss_sum, device=accelerator.device)
        self.finite = Finite(accelerator.device, self.scaler.is_enabled())
        of_log = args.save_dir, self.total_steps, self.state.step, self.state.records
        self.log = CurvesToo(*of_log) if args.report_to else TrainingLog(*of_log)

    def step(self) -> None:
        """One optimizer step. Its loss is the sum over all micro-batches, divided by the label tokens of the whole
        batch: the loss, and so the gradients, of one padded batch, however it was split."""
        args, state, number = self.args, self.state, self.state.step + 1
        rows = self.batches.rows_of(number, args.seed)
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
        self.random = self.accelerator.random_states()
        state.step, state.reported = number, False
        self.log.bar.update()

    def gradients(self, rows: List[int], label_tokens: int) -> Optional[torch.Tensor]:
        """Add the gradients of these rows' mean loss to the weights'; the sum of the loss, float32 []. None where the
        memory was full: some gradients may be there, and the micro-batches will be smaller."""
        total = torch.zeros((), device=self.accelerator.device)
        try:
            for micro_batch in self.batches.of(rows):
                loss = losses.forward(self.model, micro_batch, self.accelerator)
                # of several processes the mean gradient is taken, and theirs are parts of one sum
                self.scaler.scale(loss * processes.count() / label_tokens).backward()
                total += loss.detach()
                self.stop.check()
            processes.average_gradients(self.trained)
            return processes.total(total)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not self.batches.make_smaller(rows):  # each row is alone already
                less_memory[:] = [option for option in less_memory if option != "--micro-batch-tokens"]
                raise
        tokens = self.state.micro_batch_tokens = self.held_out.micro_batch_tokens = self.batches.micro_batch_tokens
        if processes.count() > 1:  # the others wait where this one has left them
            begin_again_with(tokens, self.args)
        self.log.say(f"The memory is full: from here on --micro-batch-tokens is {tokens}.")
        return None

    def report(self) -> None:
        """The log line and the held-out loss of the step that is finished, where they are due."""
        args, state, step, last = self.args, self.state, self.state.step, self.state.step == self.total_steps
        held_out = None
        if self.held_out_rows and (step == 0 or last or (args.eval_step and step % args.eval_step == 0)):
            with self.clock.paused():
                total = losses.total_loss(
                    self.model, self.held_out, self.held_out_rows, self.accelerator, self.stop.check
                )
                held_out = total / int(self.held_out.label_counts[self.held_out_rows].sum())
        # from here to the end nothing stops it: what has been told is not told again
        if state.label_tokens and (step % args.log_interval == 0 or last):
            loss = self.loss_sum.item() / state.label_tokens
            self.end_at(self.finite.late())
            lr = learning_rate(step, self.total_steps, args.lr, args.warmup_steps, args.lr_scheduler)
            self.log.training_loss(step, loss, self.clock.seconds(), state.tokens, lr)
            self.loss_sum.zero_()
            state.label_tokens, state.tokens = 0, 0
            self.clock.restart()
        if held_out is not None:
            self.log.held_out_loss(step, held_out)
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

    def require_numbers(self) -> None:
        self.end_at(self.finite.late())
        require_finite_weights(self.trained)

    def drop_step(self) -> None:
        """As if the step under way had not been begun."""
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.set_random_states(self.random)
        self.accelerator.release_memory()

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
