"""What a reader sees of a training: progress bar, log lines, training_log.jsonl, training_loss.png, run.json."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


class TrainingLog:
    """Writes a training's log as it goes on: to the terminal, and to `training_log.jsonl` in `save_dir`."""

    def __init__(self, save_dir: str, total_steps: int):
        self.directory = Path(save_dir)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.total_steps = total_steps
        self.records = []
        self.file = open(self.directory / "training_log.jsonl", "w", encoding="utf-8")
        self.bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        self.file.close()

    def train(self, step: int, loss: float, duration: float, tokens: int, lr: float) -> None:
        """What happened since the last line: the mean loss of a label token, seconds, tokens (padding not counted)."""
        throughput = tokens / duration
        self._line(
            f"[Step {step}/{self.total_steps}] | Loss: {loss:.5f} | Duration: {duration:.2f} | "
            f"Throughput: {throughput:.2f} tokens/sec"
        )
        self._record(step=step, loss=loss, duration=duration, tokens_per_second=throughput, lr=lr)

    def step(self) -> None:
        """Move the progress bar on by a step."""
        self.bar.update()

    def held_out(self, step: int, loss: float) -> None:
        """The mean loss of a label token of the held-out rows."""
        self._line(f"[Step {step}/{self.total_steps}] | Held-out loss: {loss:.5f}")
        self._record(step=step, held_out_loss=loss)

    def _line(self, text: str) -> None:
        # above the bar, and on standard output, so that it can be piped into a file
        with tqdm.external_write_mode(file=sys.stdout):
            print(text, flush=True)

    def _record(self, **values) -> None:
        self.records.append(values)
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def finish(self, options: dict, dataset_meta: dict, device: str) -> None:
        """Draw training_loss.png and write run.json: everything that is needed to run the same again."""
        try:
            draw_losses(self.records, self.directory / "training_loss.png")
        except Exception as error:  # a picture is not worth a trained model, which is saved after this
            print(f"training_loss.png was not drawn: {error}")
        run = {
            "command": sys.argv,
            "options": options,
            "dataset": dataset_meta,
            "device": device,
            "commit": _commit(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": version("transformers"),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        (self.directory / "run.json").write_text(json.dumps(run, indent=2, ensure_ascii=False), encoding="utf-8")


def draw_losses(records: list, path: Path) -> None:
    """A picture of the losses: of the training batches, and of the held-out rows where there are any."""
    import matplotlib

    matplotlib.use("Agg")  # a server has no screen
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for key, label, style in (("loss", "training", "-"), ("held_out_loss", "held-out", "o--")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points), style, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss per token", title="Loss")
    axes.xaxis.get_major_locator().set_params(integer=True)  # there is no step 2.5
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _commit():
    """The commit of these scripts; None where they are not in a git checkout, or git is missing."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
