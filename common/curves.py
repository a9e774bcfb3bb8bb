"""A training's curves for TensorBoard (https://www.tensorflow.org/tensorboard), of --report-to tensorboard.

They lie in SAVE_DIR/tensorboard, beside training_log.jsonl, and have its numbers and steps, under the same names.
"""

from __future__ import annotations

from typing import List

from common.progress import TrainingLog

PLACE = "tensorboard"  # in the save directory
NOT_A_CURVE = ("step", "duration", "best_held_out_loss")


class CurvesToo(TrainingLog):
    """A TrainingLog that writes its lines as points of curves as well; of several processes the first one alone.

    A training that goes on writes those of its `records` anew. What an earlier process wrote after the checkpoint is in
    no record, and goes with its file, so that no step is there twice.
    """

    def __init__(self, save_dir: str, total_steps: int, step: int, records: List[dict]):
        super().__init__(save_dir, total_steps, step, records)
        self.writer = None
        if self.writes:
            from torch.utils.tensorboard import SummaryWriter

            for old in (self.directory / PLACE).glob("events.out.tfevents.*"):
                old.unlink()
            self.writer = SummaryWriter(str(self.directory / PLACE))
            for record in records:
                self._add(record)

    def __exit__(self, *error):
        super().__exit__(*error)
        if self.writer:
            self.writer.close()

    def _tell(self, words: str, **record) -> None:
        super()._tell(words, **record)
        if self.writer:
            self._add(record)

    def _add(self, record: dict) -> None:
        for name, value in record.items():
            if name not in NOT_A_CURVE and isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()  # for whoever looks, and for a process that is killed
