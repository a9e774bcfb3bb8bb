"""Checkpoints: when they are written, which are kept, and how an interrupted run resumes.

    checkpoint-40/checkpoint.json   {"format": "finetuning-checkpoint", "version": 2, "sha256": "...", "files": {...}}
    checkpoint-40/...               the trained parameters, the optimizer's state, the random states

A checkpoint holds all that a training needs to resume to the last bit as if it had never been interrupted. Batches and
learning rates follow from the step, so no data is read again. The tensors are stored by torch.distributed.checkpoint,
whose files another number of ranks can read (before torch 2.2 by torch.save). Neither has a checksum, and a flipped bit
would load without an error: so the JSON, which is written last, holds a digest of each file.

Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import torch

from common import distributed
from common.device import Device
from common.support.compat import distributed_checkpoint
from common.support.exit import StopRequest, UserError, disk_problem, is_peer_failure, short_message
from common.support.files import Lock, atomic_directory, remove_scratch, weights_fingerprint
from common.support.model_dir import RUN

FORMAT = "finetuning-checkpoint"
VERSION = 2
METADATA = "checkpoint.json"
TENSORS = "tensors.pt"  # by torch.save, of an older torch
MINUTES = 30  # from one checkpoint to the next, unless --save-steps says something else
# Options that change nothing of what is learned. The last four are compared by what they lead to: the fingerprint of
# the model's weights, the digest of the data, and the number of steps.
MAY_CHANGE_ON_RESUME = {
    "save_dir", "log_interval", "eval_step", "eval_rows", "save_steps", "save_total_limit", "restart",
    "micro_batch_tokens", "gradient_checkpointing", "deterministic", "skip_nonfinite", "report_to",
    "model_name_or_path", "dataset_name_or_path", "epochs", "max_train_steps",
}  # fmt: skip


class Checkpoint(NamedTuple):
    """A checkpoint on the disk, and what its JSON says."""

    path: Path
    metadata: dict

    @property
    def state(self) -> dict:
        """How far the training had come: the fields of common.trainer.TrainState."""
        return self.metadata["state"]

    @property
    def options(self) -> dict:
        """The options of the interrupted command."""
        return self.metadata["options"]


# ------------------------------------------------------------------------------------------------ find


def find_checkpoint(args) -> Optional[Checkpoint]:
    """The checkpoint from which the command `args` resumes an interrupted run, None for a new run.

    From here on the save directory is locked until the process ends. Raises UserError where another process trains
    there, where the run that was interrupted had other options, or where its checkpoints are all damaged.
    """
    directory = Path(args.save_dir)
    if distributed.is_main_process():
        Lock(directory)
        remove_scratch(directory)
    for path in directory.glob("checkpoint-*"):
        if not (path / METADATA).exists():
            raise UserError(f"{path} was not written by these scripts. Move it, or choose another --save-dir.")
    paths = list_checkpoints(directory)
    if args.restart or not paths:
        if (directory / RUN).is_file():
            print(f"{directory} contains a finished run; starting a new one.", flush=True)
        return None
    first_problem = ""
    for path in paths:
        metadata = read_metadata(path)
        damage = find_damage(path, metadata)
        if damage:
            first_problem = first_problem or f"{path} {damage}"
            continue
        model = weights_fingerprint(args.model_name_or_path)
        _require_unchanged(path, changed_options(metadata, args, model))
        if first_problem:
            print(f"{first_problem}; using the older checkpoint {path}.")
        step = metadata["state"]["step"]
        print(f"Resuming from step {step} of {metadata['steps']}: {path}", flush=True)
        return Checkpoint(path, metadata)
    raise UserError(f"No usable checkpoint: {first_problem}. Use --restart to start over.")


def list_checkpoints(directory) -> List[Path]:
    """These scripts' checkpoints in `directory`, the newest first: by time, because --restart begins at step 1 again.

    Those whose JSON cannot be read come first.
    """
    paths = [path for path in sorted(Path(directory).glob("checkpoint-*")) if (path / METADATA).exists()]
    return sorted(paths, key=lambda path: read_metadata(path).get("time", math.inf), reverse=True)


def read_metadata(checkpoint: Path) -> dict:
    """The JSON of a checkpoint; {} where it cannot be read."""
    try:
        metadata = json.loads((checkpoint / METADATA).read_bytes())
        return metadata if metadata["format"] == FORMAT and isinstance(metadata["time"], float) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def find_damage(checkpoint: Path, metadata: dict) -> str:
    """Why a checkpoint cannot be used, "" where it can. Every rank reads its share of the files."""
    if not metadata:
        return f"has no readable {METADATA}"
    if metadata.get("version") != VERSION:
        return f"has the format version {metadata.get('version')}, and these scripts read {VERSION}"
    if metadata.get("sha256") != _digest_of_metadata(metadata):
        return "is damaged"
    if metadata["stored_by"] != _stored_by():
        return f"was written by {metadata['stored_by']}, and this torch has {_stored_by()}"
    names = sorted(path.name for path in checkpoint.iterdir() if path.name != METADATA)
    if names != sorted(metadata["files"]):
        return "is damaged"
    mine = names[distributed.rank() :: distributed.world_size()]
    damaged = any(digest_of_file(checkpoint / name) != metadata["files"][name] for name in mine)
    return "is damaged" if distributed.any_rank(damaged) else ""


def changed_options(metadata: dict, args, model: str) -> List[str]:
    """The options that would make another run of it. model: the fingerprint of the model's weights."""
    before = metadata["options"]
    after = vars(args)
    changes = []
    for name in sorted({**before, **after}):
        of_unused_lora = name.startswith("lora_") and not args.use_lora
        if name not in MAY_CHANGE_ON_RESUME and not of_unused_lora and before.get(name) != after.get(name):
            changes.append(f"--{name.replace('_', '-')} was {before.get(name)} and is {after.get(name)}")
    if metadata["model"] != model:
        changes.append(f"--model-name-or-path {args.model_name_or_path} has different weights")
    return changes


def changed_run(metadata: dict, run: dict, args) -> List[str]:
    """The same for what the options alone do not say: the values of `run`, see Checkpoints."""
    changes = []
    if metadata["dataset"] != run["dataset"]:
        changes.append(f"--dataset-name-or-path {args.dataset_name_or_path} has different rows")
    for what in ("dtype", "device"):
        if metadata[what] != run[what]:
            changes.append(f"this run used {metadata[what]}; this device uses {run[what]}")
    step = metadata["state"]["step"]
    if metadata["steps"] != run["steps"] and (args.lr_scheduler != "constant" or run["steps"] <= step):
        changes.append(f"it had {metadata['steps']} steps with --lr-scheduler {args.lr_scheduler}, now {run['steps']}")
    return changes


def _require_unchanged(path: Path, changes: List[str]) -> None:
    if changes:
        raise UserError(
            f"{path} was written with different options: {'; '.join(changes)}. Use the same options to resume, or "
            "--restart to start over."
        )


# ------------------------------------------------------------------------------------------------ restore


def restore(checkpoint: Checkpoint, model, optimizer, scaler, device: Device) -> None:
    """Give model, optimizer, scaler and random states the values of the checkpoint, in place."""
    metadata = checkpoint.metadata
    tensors = training_tensors(model, optimizer, device)
    random = random_key()
    if distributed.rank() >= metadata["processes"]:  # a rank that was not there then
        del tensors[random]
    tensors = _read_tensors(checkpoint.path, tensors)
    _copy_parameters(tensors["parameters"], model)
    set_optimizer_state(optimizer, model, tensors["optimizer"])
    if random in tensors:
        device.set_random_states(tensors[random])
    scaler.load_state_dict(metadata["scaler"])


def training_tensors(model, optimizer, device: Device) -> dict:
    """All tensors of a checkpoint, by reference: torch.distributed.checkpoint reads into them."""
    return {
        "parameters": trained_parameters(model),
        "optimizer": get_optimizer_state(optimizer, model),
        random_key(): device.random_states(),
    }


def trained_parameters(model) -> Dict[str, torch.Tensor]:
    """The parameters that are trained, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def random_key() -> str:
    """The key of this rank's random states."""
    return f"random_{distributed.rank()}"


def get_optimizer_state(optimizer: torch.optim.Optimizer, model) -> dict:
    """The optimizer's state by reference; it is created first where there is none yet.

    Since torch 2.2 it goes by the parameters' names, so that another number of ranks finds its parts.
    """
    if not distributed_checkpoint():
        return {"state": optimizer.state_dict()["state"]}  # tensors alone: torch 1.13 loads nothing else safely
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    is_new = not optimizer.state
    state = get_optimizer_state_dict(model, optimizer)
    if is_new:
        for values in optimizer.state.values():  # torch creates it by a step, which must not count
            values["step"] = values["step"] * 0
        state = get_optimizer_state_dict(model, optimizer)
    return state


def set_optimizer_state(optimizer: torch.optim.Optimizer, model, state: dict) -> None:
    """Give the optimizer a state as get_optimizer_state returns it."""
    if not distributed_checkpoint():
        optimizer.load_state_dict({**optimizer.state_dict(), **state})
        return
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, state)


def _copy_parameters(stored: dict, model) -> None:
    for name, parameter in trained_parameters(model).items():
        if stored[name] is not parameter:  # by torch.save; the others were read in place
            parameter.copy_(stored[name])


# ------------------------------------------------------------------------------------------------ save


class Checkpoints:
    """Writes the checkpoints of a run into its save directory, and removes those that are no longer needed.

    dataset: the digest of the dataset file; total_steps: of the run. Raises UserError where `resume` is the checkpoint
    of a run with other data, another device or other steps, or where --save-steps asks for checkpoints for which the
    disk has no room.
    """

    def __init__(self, args, resume: Optional[Checkpoint], model, optimizer, device: Device, dataset: str, steps: int):
        self.args = args
        self.directory = Path(args.save_dir)
        self.run = {
            "run": uuid.uuid4().hex,
            "model": weights_fingerprint(args.model_name_or_path),
            "options": dict(vars(args)),
            "dataset": dataset,
            "dtype": str(device.dtype).replace("torch.", ""),
            "device": device.torch_device.type,
            "steps": steps,
            "processes": distributed.world_size(),
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        if resume:
            _require_unchanged(resume.path, changed_run(resume.metadata, self.run, args))
            self.run["run"] = resume.metadata["run"]
            for path in list_checkpoints(self.directory):
                if path == resume.path:
                    break
                remove_checkpoint(path)  # newer ones are damaged
        self.run = distributed.broadcast_object(self.run)
        self.enabled = self._has_disk_space(model, optimizer)
        self.warned = False
        self.last_time = time.monotonic()

    def own(self) -> List[Path]:
        """The checkpoints of this run, the newest first."""
        paths = list_checkpoints(self.directory)
        return [path for path in paths if read_metadata(path).get("run") == self.run["run"]]

    def is_due(self, step: int, interval_is_over: bool) -> bool:
        """Whether to write a checkpoint after `step`. interval_is_over: on any rank, see minutes_are_over."""
        if step == 0 or not self.enabled or self.is_written(step):
            return False
        if step == self.run["steps"] and self.own():
            return True  # saving the model, which comes next, can fail
        if self.args.save_steps:
            return step % self.args.save_steps == 0
        return interval_is_over

    def minutes_are_over(self) -> bool:
        """Whether this rank's last checkpoint is MINUTES old."""
        return time.monotonic() - self.last_time >= 60 * MINUTES

    def is_written(self, step: int) -> bool:
        """Whether this run has a checkpoint of `step`."""
        return read_metadata(self.directory / f"checkpoint-{step}").get("run") == self.run["run"]

    def save(self, tensors: dict, state: dict, scaler: dict, stop: StopRequest, warn) -> bool:
        """Write the checkpoint of `state`, and remove those that are too old; whether that worked.

        Where it does not work, because the disk is full, the training continues and the last checkpoint stays: `warn`
        is called with a line once.
        """
        path = self.directory / f"checkpoint-{state['step']}"
        metadata = {"time": time.time(), **self.run, "scaler": scaler, "state": state}
        try:
            if path.exists():  # an earlier run's checkpoint of the same step
                remove_checkpoint(path)
            write_checkpoint(path, tensors, metadata)
        except BaseException as error:  # torch's CheckpointException is no Exception
            if stop.at_once:  # torch's writer took Ctrl-C for an error of the disk
                raise KeyboardInterrupt from None
            if isinstance(error, (KeyboardInterrupt, SystemExit)) or is_peer_failure(error):
                raise
            if not self.warned:
                reason = disk_problem(error) or short_message(error)
                warn(f"Could not write {path} ({reason}). Training continues without it.")
            self.warned = True
            return False
        finally:
            self.last_time = time.monotonic()
        best = self.directory / f"checkpoint-{state['best_step']}"
        kept = self.own()[: self.args.save_total_limit] + [best]
        for other in list_checkpoints(self.directory):
            if other not in kept:
                remove_checkpoint(other)
        return True

    def load_parameters_of_step(self, step: int, model) -> bool:
        """Give the model the parameters that it had after `step`; False where that checkpoint is damaged."""
        if step == self.run["steps"]:  # the last ones, which it has
            return True
        path = self.directory / f"checkpoint-{step}"
        if find_damage(path, read_metadata(path)):
            print(f"The best checkpoint {path} is damaged; saving the last weights instead.")
            return False
        _copy_parameters(_read_tensors(path, {"parameters": trained_parameters(model)})["parameters"], model)
        return True

    def _has_disk_space(self, model, optimizer) -> bool:
        """Whether the disk has room for this run's checkpoints, the one that is being written included."""
        numbers = sum(parameter.numel() for parameter in trained_parameters(model).values())
        bytes_per_state = 1 if "8bit" in type(optimizer).__name__ else 4
        size = numbers * (4 + 2 * bytes_per_state)  # AdamW has two states for each parameter
        count = self.args.save_total_limit + 1 + int(self.args.keep_best) - len(list_checkpoints(self.directory))
        missing = count * size - distributed.broadcast_object(shutil.disk_usage(self.directory).free)
        if missing <= 0:
            return True
        line = (
            f"The disk of {self.directory} has no room for {count} checkpoints of {size / 1e9:.1f} GB: "
            f"{missing / 1e9:.1f} GB are missing."
        )
        if self.args.save_steps or self.args.keep_best:
            raise UserError(
                f"{line} Free disk space, choose another --save-dir, or leave out --save-steps and --keep-best."
            )
        print(f"{line} No checkpoints will be written: an interrupted run must start over.", flush=True)
        return False


def write_checkpoint(checkpoint: Path, tensors: dict, metadata: dict) -> None:
    """Write a checkpoint as a whole or not at all. tensors: a nested dict; metadata: what JSON can hold."""
    with distributed.on_main_process(lambda: atomic_directory(checkpoint)) as new:
        if distributed_checkpoint():
            distributed_checkpoint().save(tensors, checkpoint_id=str(new))
        else:
            # The default writer aborts the process where the disk is full, in torch 1.13.
            torch.save(tensors, new / TENSORS, _use_new_zipfile_serialization=False)
        names = sorted(path.name for path in new.iterdir())
        mine = names[distributed.rank() :: distributed.world_size()]
        digests = {}
        for share in distributed.gather_objects({name: digest_of_file(new / name) for name in mine}):
            digests.update(share)
        metadata = {"format": FORMAT, "version": VERSION, "stored_by": _stored_by(), **metadata, "files": digests}
        metadata["sha256"] = _digest_of_metadata(metadata)
        if distributed.is_main_process():
            (new / METADATA).write_text(json.dumps(metadata), encoding="utf-8")


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint: it loses its name first, so that one that is half removed is never found."""
    if distributed.is_main_process():
        with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=f".{checkpoint.name}.") as scratch:
            os.replace(checkpoint, Path(scratch) / checkpoint.name)


def _read_tensors(checkpoint: Path, tensors: dict) -> dict:
    """The tensors of a checkpoint: torch.distributed.checkpoint reads them into those of `tensors`."""
    if not distributed_checkpoint():
        return torch.load(checkpoint / TENSORS, map_location="cpu", weights_only=True)
    distributed_checkpoint().load(tensors, checkpoint_id=str(checkpoint))
    return tensors


def digest_of_file(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(2**24), b""):
            digest.update(piece)
    return digest.hexdigest()


def _digest_of_metadata(metadata: dict) -> str:
    return hashlib.sha256(json.dumps({**metadata, "sha256": ""}, sort_keys=True).encode()).hexdigest()


def _stored_by() -> str:
    return "torch.distributed.checkpoint" if distributed_checkpoint() else "torch.save"
