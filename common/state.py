"""How far a training has come, and whether a command is that of the run that was cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional

from common import UserError, after_interrupt, processes

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
        f"the memory of process {processes.number()} of {processes.count()} is full. Run the same command again: it "
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


def tell_what_follows(step: int, steps: int) -> None:
    """Let whoever is interrupted from here on read from where the same command goes on."""
    what = "to save the model" if step == steps else f"to go on from step {step}"
    after_interrupt[:] = [f"Run the same command {what}."]
