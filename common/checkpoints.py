"""A run that can be cut at any time: where it goes on, when it writes a checkpoint, and which of them stay.

A checkpoint `SAVE_DIR/checkpoint-STEP` holds what the training needs to go on to the last bit as if it had never been
cut: trained weights, optimizer, scaler, random states, and how far it and its log had come. Batches and learning rates
follow from the step, so that no data is gone through again. How it lies on the disk: common/checkpoint_files.py.
"""

from __future__ import annotations

import sys
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import List

from common import UserError, full_disk, processes, reason_of
from common.checkpoint_files import (
    checkpoints_in,
    damage_of,
    facts_of,
    has_room,
    read_tensors,
    remove_checkpoint,
    write_checkpoint,
)
from common.files import remove_scratch, weights_fingerprint
from common.model_directory import RUN
from common.state import State, after_full_memory, other_options, other_run, tell_what_follows
from common.stopping import Lock, StopRequest

MINUTES = 30  # of work, from one checkpoint to the next


class Checkpoints:
    """The checkpoints of a run in `args.save_dir`, which it has for itself until the process ends.

    To be made before anything is loaded: it says where a run goes on that was cut, and refuses options by which it
    would become another one. UserError: another process is at work there, or what is there can't be continued.
    """

    def __init__(self, args):
        self.args, self.directory = args, Path(args.save_dir)
        first = processes.is_first()  # it looks for all of them, which hear of it in `begin`
        if first:
            self.lock = Lock(self.directory)
            remove_scratch(self.directory)
        self.model = weights_fingerprint(args.model_name_or_path)
        self.options = dict(vars(args))  # as given: bits may become those of the base
        self.run = uuid.uuid4().hex
        self.kept: List[Path] = []  # of this run, the newest first
        self.others = checkpoints_in(self.directory) if first else []  # of an earlier one, until the first is whole
        self.facts: dict = {}  # of the checkpoint from which the run goes on
        self.none, self.told, self.written = False, False, time.monotonic()
        self.random = "random" if first else f"random_of_{processes.number()}"
        if not args.restart and self.others:
            self._go_on()
        elif first and (self.directory / RUN).is_file():
            print(f"{self.directory} holds a finished run: this one begins anew.", flush=True)

    @property
    def before(self) -> dict:
        """The state of the run that goes on, as common.state has it; {} of a new one."""
        return self.facts.get("state", {})

    def begin(self, model, optimizer, scaler, accelerator, total_steps: int, dataset: str) -> State:
        """The state from which to go on; model, optimizer, scaler and random states are made what they were then.

        dataset: the digest of the dataset file. UserError: data, type or steps are not those of the run that was cut;
        or --save-steps asks for checkpoints for which the disk has no room.
        """
        self.network, self.optimizer, self.scaler, self.accelerator = model, optimizer, scaler, accelerator
        self.what = {"dataset": dataset, "dtype": str(accelerator.dtype), "steps": total_steps}
        found = self.facts, self.run, self.kept, self.others
        self.facts, self.run, self.kept, self.others = processes.from_first(found)
        tokens = self.args.micro_batch_tokens or accelerator.micro_batch_tokens
        state = State(micro_batch_tokens=tokens, gradient_checkpointing=bool(self.args.gradient_checkpointing))
        if self.facts:
            self._refuse(self.kept[0], other_run(self.facts, self.what, self.options))
            from common.optimizer import set_state

            tensors = self._tensors()
            if processes.number() >= self.facts.get("processes", 1):  # one that was not there then
                del tensors[self.random]
            tensors = read_tensors(self.kept[0], tensors)
            self._take_weights(tensors["weights"])
            set_state(self.optimizer, self.network, tensors["optimizer"])
            if self.random in tensors:
                accelerator.set_random_states(tensors[self.random])
            self.scaler.load_state_dict(self.facts["scaler"])
            given = self.options["micro_batch_tokens"] != self.facts["options"]["micro_batch_tokens"]
            kept = {**self.before, "gradient_checkpointing": state.gradient_checkpointing}
            state = State(**{**kept, **({"micro_batch_tokens": tokens} if given else {})})
        if processes.number() >= self.facts.get("processes", 1):  # each drops something else where it has dropout
            processes.seed(self.args.seed + state.step)
        fewer = after_full_memory(self.args, state.micro_batch_tokens)
        state.micro_batch_tokens = processes.from_first(fewer)
        self._require_room()
        self.written = time.monotonic()
        return state

    def due(self, state: State) -> bool:
        """Whether to write a checkpoint now. A run longer than one interval has one of its last step, too: what comes
        then, to save the model, can fail."""
        if not state.step or self.none or self._is_written(state):
            return False
        every = self.args.save_steps
        waited = processes.any_of(time.monotonic() - self.written >= 60 * MINUTES)
        last = state.step == self.what["steps"] and bool(self.kept)
        return last or (state.step % every == 0 if every else waited)

    def write(self, state: State, stop: StopRequest) -> bool:
        """Write the checkpoint of `state` and remove those that are too old; whether that was done. Where it was not,
        by a full disk, the training goes on, and the one before stays: that is told once."""
        path = self.directory / f"checkpoint-{state.step}"
        facts = {"time": time.time(), "run": self.run, "model": self.model, "options": self.options, **self.what}
        facts["processes"] = processes.count()
        facts.update(scaler=self.scaler.state_dict(), state={**asdict(state), "loss_sum": float(state.loss_sum)})
        try:
            write_checkpoint(path, self._tensors(), facts)
        except BaseException as error:  # torch's own CheckpointException is no Exception
            if stop.at_once:  # torch's writer took Ctrl-C for an error of the disk
                raise KeyboardInterrupt from None
            if isinstance(error, (KeyboardInterrupt, SystemExit)) or processes.lost_another(error):
                raise
            if not self.told:
                from tqdm import tqdm

                reason = full_disk(error) or reason_of(error)
                stays = f"{self.kept[0]} stays" if self.kept else "there is none yet"
                tqdm.write(f"{path} could not be written ({reason}): {stays}, the training goes on.")
            self.told = True
            return False
        finally:
            self.written = time.monotonic()
        best = self.directory / f"checkpoint-{state.best_step}"
        self.kept = [path] + [other for other in self.kept if other != path]
        late = [other for other in self.kept[self.args.save_total_limit :] if other != best]
        for other in late + [other for other in self.others if other != path]:
            remove_checkpoint(other)
        self.kept, self.others = [other for other in self.kept if other not in late], []
        tell_what_follows(state.step, self.what["steps"])
        return True

    def leave(self, state: State, stop: StopRequest) -> None:
        """End the process as the signal would that `stop` has heard; what has been done until now is kept."""
        if state.step and not self.none and (self._is_written(state) or self.write(state, stop)):
            line = f"Stopped after step {state.step}, kept in {self.kept[0]}. Run the same command to go on from there."
        elif self.kept:
            line = f"Stopped. Run the same command to go on from {self.kept[0]}."
        else:
            line = "Stopped, and nothing is kept. Run the same command to start again."
        print(f"\n{line}", file=sys.stderr)
        sys.exit(128 + stop.number)

    def take_weights_of(self, step: int) -> bool:
        """Give the model the weights that it had after `step`, of which there is a checkpoint; whether it was whole."""
        if step == self.what["steps"]:  # it has them: they are the last ones
            return True
        path = self.directory / f"checkpoint-{step}"
        damage = processes.from_first(damage_of(path) if processes.is_first() else "")
        if damage:
            print(f"The best weights are lost, {path} {damage}: the last ones are saved.")
            return False
        self._take_weights(read_tensors(path, {"weights": self._weights()})["weights"])
        return True

    def _take_weights(self, stored: dict) -> None:
        for name, weight in self._weights().items():
            if stored[name] is not weight:  # torch.save's; the others have been read in place
                weight.copy_(stored[name])

    def _go_on(self) -> None:
        """Find the newest one that is whole."""
        problem = ""
        for path in self.others:
            damage = damage_of(path)
            facts = facts_of(path)
            if damage:
                problem = problem or f"{path} {damage}"
                continue
            self._refuse(path, other_options(facts, self.options, self.model))
            if problem:
                print(f"{problem}: {path}, the one before it, is taken.")
            self.facts, self.run = facts, facts["run"]
            self.kept = [path] + [p for p in self.others if p != path and facts_of(p).get("run") == self.run]
            self.others = [other for other in self.others if other not in self.kept]
            step, steps = facts["state"]["step"], facts["steps"]
            print(f"Continuing from step {step} of {steps}: {path}", flush=True)
            tell_what_follows(step, steps)
            return
        raise UserError(f"{problem}, so that nothing can go on from it. To begin anew: --restart.")

    def _refuse(self, path: Path, differ: List[str]) -> None:
        if differ:
            raise UserError(
                f"{path} is of a run with other options: {'; '.join(differ)}. Give them as they were to go on, or "
                "--restart to begin anew."
            )

    def _require_room(self) -> None:
        numbers = sum(weight.numel() for weight in self._weights().values())
        size = numbers * (4 + (2 if "8bit" in type(self.optimizer).__name__ else 8))  # AdamW has two states a weight
        new = self.args.save_total_limit + 1 + self.args.keep_best - len(self.kept + self.others)
        asked = bool(self.args.save_steps or self.args.keep_best)
        self.none = not has_room(self.directory, new, size, asked)

    def _is_written(self, state: State) -> bool:
        return bool(self.kept) and self.kept[0].name == f"checkpoint-{state.step}"

    def _weights(self) -> dict:
        return {name: weight.detach() for name, weight in self.network.named_parameters() if weight.requires_grad}

    def _tensors(self) -> dict:
        """All tensors that are to be kept, by reference: what is read into them is restored."""
        from common.optimizer import state_of

        optimizer = state_of(self.optimizer, self.network)
        return {"weights": self._weights(), "optimizer": optimizer, self.random: self.accelerator.random_states()}
