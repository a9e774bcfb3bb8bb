"""Where the time of a training step goes: the parts of Trainer.train_step, in seconds and percent.

    make bench-step
    make bench-step BENCH="--use-lora"

It runs tutorial/train_smollm2.py on the page's rows, with clocks around its parts; more options go to that script. The
first steps warm up and do not count.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as common/support/exit.py, before torch is imported

import torch

import common.batches
import common.trainer
from common.train_log import TrainLog

ROOT = Path(__file__).resolve().parents[2]
STEPS = 13
WARM_UP = 3
seconds: Counter = Counter()
finished = 0


def measured(owner, name: str, part: str) -> None:
    """Let a clock of `part` run while `owner.name` does."""
    function = getattr(owner, name)

    def with_clock(*args, **options):
        counts = finished >= WARM_UP
        begin = time.perf_counter()
        result = function(*args, **options)
        if counts:
            seconds[part] += time.perf_counter() - begin
        return result

    setattr(owner, name, with_clock)


def main() -> None:
    trainer = common.trainer.Trainer
    step = trainer.train_step

    def count_steps(self) -> None:
        global finished
        measured(self.optimizer, "step", "optimizer step")
        measured(self.optimizer, "zero_grad", "gradients freed")
        step(self)
        del self.optimizer.step, self.optimizer.zero_grad  # the clocks of this step
        finished += 1

    trainer.train_step = count_steps
    measured(trainer, "train_step", "whole step")
    measured(common.batches.Batches, "micro_batches", "micro-batches made")
    measured(common.trainer, "forward", "forward")
    measured(torch.Tensor, "backward", "backward")
    measured(common.trainer, "clip_gradients", "clipping")
    measured(trainer, "check_stop", "asked to stop?")
    measured(TrainLog, "log_train", "log line")
    with tempfile.TemporaryDirectory() as save_dir:
        options = ["--save-dir", save_dir, "--max-train-steps", str(STEPS), "--eval-rows", "0", *sys.argv[1:]]
        sys.argv = ["tutorial/train_smollm2.py", *options]
        try:
            runpy.run_path(str(ROOT / "tutorial" / "train_smollm2.py"), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    whole = seconds.pop("whole step")
    steps = finished - WARM_UP
    seconds["the rest"] = whole - sum(seconds.values()) + seconds["log line"]  # the log line is written after the step
    print(f"\n{'part':20} {'s a step':>10} {'%':>6}")
    for part, total in seconds.most_common():
        print(f"{part:20} {total / steps:10.4f} {total / whole:6.1%}")
    print(f"{'whole step':20} {whole / steps:10.4f}")


if __name__ == "__main__":
    main()
