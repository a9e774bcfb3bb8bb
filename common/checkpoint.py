"""One checkpoint on the disk: the tensors of a training, and a JSON of ours that is written last.

    checkpoint-40/checkpoint.json   {"format": "finetuning-checkpoint", "version": 1, "sha256": "...", "files": {...}}
    checkpoint-40/...               the trained weights, the optimizer's state, the random states

The tensors are stored by torch.distributed.checkpoint, whose files another number of processes can read, before torch
2.2 by torch.save. Neither has a checksum, a flipped bit would load in silence: so the digest of each file stands in the
JSON, and is compared before anything is loaded. (The first one's metadata is a pickle, which could run code.)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Iterator, List, Optional

import torch

from common import distributed
from common.dataset_file import digest_of_meta
from common.support.exit import StopRequest, UserError, disk_problem, is_peer_failure, short_message
from common.support.files import Lock, atomic_write, remove_scratch, weights_fingerprint
from common.support.model_dir import RUN

FORMAT, VERSION, FACTS, TENSORS = "finetuning-checkpoint", 1, "checkpoint.json", "tensors.pt"
PIECE = 2**24  # bytes that are hashed at once


def checkpoints_in(directory) -> List[Path]:
    """Those of this format in `directory`, the newest first: by the time of writing, for --restart begins at step 1.

    First of all stand those whose JSON can't be read. Other trainers give the same names to theirs, which are not ours.
    """

    def ours(path: Path) -> bool:
        return (path / FACTS).exists() or (path / TENSORS).exists() or any(path.glob("*.distcp"))

    found = [path for path in Path(directory).glob("checkpoint-*") if ours(path)]
    return sorted(found, key=lambda path: facts_of(path).get("time", math.inf), reverse=True)


def facts_of(checkpoint: Path) -> dict:
    """What stands in its JSON; {} where that is none of this format."""
    try:
        facts = json.loads((checkpoint / FACTS).read_bytes())
        return facts if facts["format"] == FORMAT and isinstance(facts["time"], float) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def damage_of(checkpoint: Path) -> str:
    """Why nothing can go on from it, for the reader; "" where it is whole, and of this user."""
    facts = facts_of(checkpoint)
    if not facts:
        return f"has no {FACTS} that can be read"
    if facts.get("version") != VERSION:
        return f"is of another version of the format ({facts.get('version')}; this is {VERSION})"
    with tempfile.TemporaryFile(dir=checkpoint.parent) as new:  # by way of a network the owner may be another name
        mine = {os.getuid(), os.fstat(new.fileno()).st_uid}
    if not {path.stat().st_uid for path in (checkpoint, *checkpoint.iterdir())} <= mine:
        return "belongs to another user, whose files could run code here"
    names = {path.name for path in checkpoint.iterdir()} - {FACTS}
    if facts.get("sha256") != digest_of_meta({**facts, "sha256": ""}) or names != set(facts["files"]):
        return "is damaged"
    if any(_digest(checkpoint / name) != digest for name, digest in facts["files"].items()):
        return "is damaged"
    if facts["stored_by"] != _stored_by():
        return f"was written by {facts['stored_by']}, and this torch has {_stored_by()}"
    return ""


def has_room(directory: Path, new: int, size: int, asked: bool) -> bool:
    """Whether the disk has room for so many `new` ones of `size` bytes; where it has not, the reader is told, or, where
    checkpoints were `asked` for, UserError."""
    free = distributed.broadcast_object(shutil.disk_usage(directory).free if distributed.is_main_process() else 0)
    if new * size <= free:
        return True
    line = (
        f"The disk of {directory} has no room for {new} checkpoints of {size / 1e9:.1f} GB: "
        f"{(new * size - free) / 1e9:.1f} GB are missing."
    )
    if asked:
        raise UserError(f"{line} Free them, give another --save-dir, or leave out --save-steps and --keep-best.")
    print(f"{line} This run writes none, so what it does is lost where it is cut.", flush=True)
    return False


def write_checkpoint(checkpoint: Path, tensors: dict, facts: dict) -> None:
    """Write it whole, or not at all. tensors: a nested dict; facts: whatever JSON holds. UserError where another
    trainer's has the name."""
    with distributed.on_main_process(lambda: _new_checkpoint(checkpoint)) as new:
        if dcp():
            with _without_warnings():
                dcp().save(tensors, checkpoint_id=str(new))
        else:
            import torch

            # the writer of zip files aborts the process where the disk is full, in torch 1.13
            torch.save(tensors, new / TENSORS, _use_new_zipfile_serialization=False)
        if distributed.is_main_process():
            files = {path.name: _digest(path) for path in sorted(new.iterdir())}
            how = {"format": FORMAT, "version": VERSION, "stored_by": _stored_by()}
            facts = {**how, **facts, "files": files, "sha256": ""}
            facts["sha256"] = digest_of_meta(facts)
            (new / FACTS).write_text(json.dumps(facts), encoding="utf-8")


@contextmanager
def _new_checkpoint(checkpoint: Path) -> Iterator[Path]:
    if checkpoint.exists() and checkpoint not in checkpoints_in(checkpoint.parent):
        raise UserError("it is there, and is another trainer's")
    with atomic_write(checkpoint, stale=("*",)) as new:
        new.mkdir()
        yield new


def read_tensors(checkpoint: Path, tensors: dict) -> dict:
    """The tensors of a checkpoint that is whole: torch.distributed.checkpoint reads into those of `tensors`."""
    if not dcp():
        import torch

        return torch.load(checkpoint / TENSORS, map_location="cpu", weights_only=True)
    with _without_warnings():
        dcp().load(tensors, checkpoint_id=str(checkpoint))
    return tensors


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove it; one that is half removed does not have the name of one."""
    if not distributed.is_main_process():
        return
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=f".{checkpoint.name}.") as scratch:
        os.replace(checkpoint, Path(scratch) / checkpoint.name)


def dcp():
    """torch.distributed.checkpoint, where it works without a process group: in torch 2.2 and newer; else None."""
    try:
        import torch.distributed.checkpoint as found
    except ImportError:  # before torch 2.0, and where torch was built without it
        return None
    return found if hasattr(found, "save") else None


def _stored_by() -> str:
    return "torch.distributed.checkpoint" if dcp() else "torch.save"


@contextmanager
def _without_warnings():
    """It warns that there is no process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _digest(path: Path) -> str:
    """SHA-256 of the digests of a file's pieces, which are hashed side by side."""

    def digest_of_piece(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(PIECE)).digest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return hashlib.sha256(b"".join(threads.map(digest_of_piece, range(0, path.stat().st_size, PIECE)))).hexdigest()


# options that change nothing of what is learned; two that are compared by what they name; two that make the steps
FREE = {
    "save_dir", "log_interval", "eval_step", "eval_rows", "save_steps", "save_total_limit", "restart",
    "micro_batch_tokens", "gradient_checkpointing", "deterministic", "skip_nonfinite", "report_to",
    "model_name_or_path", "dataset_name_or_path", "epochs", "max_train_steps",
}  # fmt: skip


@dataclass
class State:
    """How far a training has come, besides its tensors."""

    step: int = 0  # the last one that is finished
    reported: bool = False  # whether its log line and its held-out loss have been told
    loss_sum: float = 0.0  # of the log line under way, like the next three; in the training a tensor on the device
    label_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0  # steps without a finite loss or gradient
    micro_batch_tokens: int = 0  # like the next one as the plan has chosen it, or as it was given
    gradient_checkpointing: bool = False
    best_step: int = 0
    best_loss: Optional[float] = None  # of the held-out rows, where --keep-best asks for it
    records: List[dict] = field(default_factory=list)  # of training_log.jsonl


FULL_MEMORY = ".full_memory"  # in the save directory


def begin_again_with(tokens: int, args) -> None:
    """UserError, where the memory of one of several processes was full: the next start takes micro-batches of so many
    tokens at most, unless it is given another --micro-batch-tokens."""
    Path(args.save_dir, FULL_MEMORY).write_text(f"{args.micro_batch_tokens} {tokens}", encoding="utf-8")
    raise UserError(
        f"the memory of process {distributed.rank()} of {distributed.world_size()} is full. Run the command again: it "
        f"goes on with --micro-batch-tokens {tokens}."
    )


def after_full_memory(args, tokens: int) -> int:
    """`tokens` of a micro-batch, or the fewer that an earlier start has noted."""
    try:
        given, fewer = map(int, Path(args.save_dir, FULL_MEMORY).read_text(encoding="utf-8").split())
    except (OSError, ValueError):
        return tokens
    return min(tokens, fewer) if given == args.micro_batch_tokens and not args.restart else tokens


def other_options(facts: dict, options: dict, model: str) -> List[str]:
    """Options by which a run would become another one than that of a checkpoint's `facts`, for the reader.

    model: a fingerprint of its weights, by which a directory may be moved."""
    before = facts["options"]
    asked = [name for name in {**before, **options} if name not in FREE]
    if not options["use_lora"]:
        asked = [name for name in asked if not name.startswith("lora_")]
    names = sorted(name for name in asked if before.get(name) != options.get(name))
    differ = [f"--{name.replace('_', '-')} was {before.get(name)} and is {options.get(name)}" for name in names]
    if facts["model"] != model:
        names = before["model_name_or_path"], options["model_name_or_path"]
        differ.append(f"--model-name-or-path was {names[0]} and is {names[1]}, whose weights are others")
    return differ


def other_run(facts: dict, now: dict, options: dict) -> List[str]:
    """The same of what the options alone don't tell: "dataset" (a digest), "dtype" and "steps"."""
    differ = []
    if facts["dataset"] != now["dataset"]:
        names = facts["options"]["dataset_name_or_path"], options["dataset_name_or_path"]
        differ.append(f"--dataset-name-or-path was {names[0]} and is {names[1]}, whose rows are others")
    if facts["dtype"] != now["dtype"]:
        differ.append(f"products were in {facts['dtype']} and are in {now['dtype']} on this device")
    if facts["steps"] != now["steps"]:
        steps = f"--epochs and --max-train-steps made {facts['steps']} steps and make {now['steps']}"
        schedule, done = options["lr_scheduler"], facts["state"]["step"]
        if schedule != "constant":
            differ.append(f"{steps}, on which the {schedule} learning rate depends")
        elif now["steps"] <= done:
            differ.append(f"{steps}, and {done} are done")
    return differ


MINUTES = 30  # of work, from one checkpoint to the next


class Checkpoints:
    """The checkpoints of a run in `args.save_dir`, which it has for itself until the process ends.

    To be made before anything is loaded: it says where a run goes on that was cut, and refuses options by which it
    would become another one. UserError: another process is at work there, or what is there can't be continued.
    """

    def __init__(self, args):
        self.args, self.directory = args, Path(args.save_dir)
        first = distributed.is_main_process()  # it looks for all of them, which hear of it in `begin`
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
        self.random = "random" if first else f"random_of_{distributed.rank()}"
        if not args.restart and self.others:
            self._go_on()
        elif first and (self.directory / RUN).is_file():
            print(f"{self.directory} holds a finished run: this one begins anew.", flush=True)

    @property
    def before(self) -> dict:
        """The state of the run that goes on, as common.checkpoint has it; {} of a new one."""
        return self.facts.get("state", {})

    def begin(self, model, optimizer, scaler, device, total_steps: int, dataset: str) -> State:
        """The state from which to go on; model, optimizer, scaler and random states are made what they were then.

        dataset: the digest of the dataset file. UserError: data, type or steps are not those of the run that was cut;
        or --save-steps asks for checkpoints for which the disk has no room.
        """
        self.network, self.optimizer, self.scaler, self.device = model, optimizer, scaler, device
        self.what = {"dataset": dataset, "dtype": str(device.dtype), "steps": total_steps}
        found = self.facts, self.run, self.kept, self.others
        self.facts, self.run, self.kept, self.others = distributed.broadcast_object(found)
        tokens = self.args.micro_batch_tokens or device.micro_batch_tokens
        state = State(micro_batch_tokens=tokens, gradient_checkpointing=bool(self.args.gradient_checkpointing))
        if self.facts:
            self._refuse(self.kept[0], other_run(self.facts, self.what, self.options))
            from common.optim import set_state

            tensors = self._tensors()
            if distributed.rank() >= self.facts.get("processes", 1):  # one that was not there then
                del tensors[self.random]
            tensors = read_tensors(self.kept[0], tensors)
            self._take_weights(tensors["weights"])
            set_state(self.optimizer, self.network, tensors["optimizer"])
            if self.random in tensors:
                device.set_random_states(tensors[self.random])
            self.scaler.load_state_dict(self.facts["scaler"])
            given = self.options["micro_batch_tokens"] != self.facts["options"]["micro_batch_tokens"]
            kept = {**self.before, "gradient_checkpointing": state.gradient_checkpointing}
            state = State(**{**kept, **({"micro_batch_tokens": tokens} if given else {})})
        if distributed.rank() >= self.facts.get("processes", 1):  # each drops something else where it has dropout
            torch.manual_seed(self.args.seed + state.step + 1_000_003 * distributed.rank())
        fewer = after_full_memory(self.args, state.micro_batch_tokens)
        state.micro_batch_tokens = distributed.broadcast_object(fewer)
        self._require_room()
        self.written = time.monotonic()
        return state

    def due(self, state: State) -> bool:
        """Whether to write a checkpoint now. A run longer than one interval has one of its last step, too: what comes
        then, to save the model, can fail."""
        if not state.step or self.none or self._is_written(state):
            return False
        every = self.args.save_steps
        waited = distributed.any_rank(time.monotonic() - self.written >= 60 * MINUTES)
        last = state.step == self.what["steps"] and bool(self.kept)
        return last or (state.step % every == 0 if every else waited)

    def write(self, state: State, stop: StopRequest) -> bool:
        """Write the checkpoint of `state` and remove those that are too old; whether that was done. Where it was not,
        by a full disk, the training goes on, and the one before stays: that is told once."""
        path = self.directory / f"checkpoint-{state.step}"
        facts = {"time": time.time(), "run": self.run, "model": self.model, "options": self.options, **self.what}
        facts["processes"] = distributed.world_size()
        facts.update(scaler=self.scaler.state_dict(), state={**asdict(state), "loss_sum": float(state.loss_sum)})
        try:
            write_checkpoint(path, self._tensors(), facts)
        except BaseException as error:  # torch's own CheckpointException is no Exception
            if stop.at_once:  # torch's writer took Ctrl-C for an error of the disk
                raise KeyboardInterrupt from None
            if isinstance(error, (KeyboardInterrupt, SystemExit)) or is_peer_failure(error):
                raise
            if not self.told:
                from tqdm import tqdm

                reason = disk_problem(error) or short_message(error)
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
        damage = distributed.broadcast_object(damage_of(path) if distributed.is_main_process() else "")
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
        from common.optim import state_of

        optimizer = state_of(self.optimizer, self.network)
        return {"weights": self._weights(), "optimizer": optimizer, self.random: self.device.random_states()}
