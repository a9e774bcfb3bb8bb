"""What a user sees of a run: progress bars, log lines, training_log.jsonl, curves, pictures, tables, run.json."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import unicodedata
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from time import monotonic, perf_counter
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from tqdm import tqdm

from common.distributed import is_main_process
from common.support.exit import UserError, install_hint, short_message
from common.support.files import atomic_write
from common.support.model_dir import base_models

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 30  # between two progress lines where there is no terminal
CURVES = ("loss", "held_out_loss", "lr", "tokens_per_second")
MAX_QUESTION = 600  # characters of a question to print; an article is longer


class TrainLog:
    """The log of a training: lines above a progress bar, training_log.jsonl, and with `report_to` curves. Use it as a
    context manager.

    step, records: where a resumed training starts, and its log so far. The log appends to `records`, and writes
    everything again: what the interrupted process logged after its checkpoint is dropped. Only rank 0 writes.
    """

    def __init__(
        self, save_dir: str, total_steps: int, step: int, records: List[dict], report_to: Optional[str] = None
    ):
        self.directory = Path(save_dir)
        self.total_steps = total_steps
        self.records = records
        self.best_point: Optional[Tuple[int, float]] = None
        self.directory.mkdir(parents=True, exist_ok=True)
        self.reporter = None
        if report_to and is_main_process():
            self.reporter = REPORTERS[report_to](self.directory)
            for record in records:
                self.report(record)
        path = self.directory / "training_log.jsonl" if is_main_process() else os.devnull
        self.file = open(path, "w", encoding="utf-8")
        self.file.writelines(json.dumps(record) + "\n" for record in records)
        # Because of `delay` the bar appears with the first step or line, below what is printed before.
        self.bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=has_window(),
            delay=1e-9,
            disable=not is_main_process(),
        )

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        self.file.flush()
        if is_main_process():
            os.fsync(self.file.fileno())
        self.file.close()
        if self.reporter:
            self.reporter.close()

    def log_train(self, step: int, loss: float, duration: float, tokens: int, lr: float) -> None:
        """Log the steps since the last line: mean loss of a label token, seconds, tokens without padding."""
        throughput = tokens / duration
        line = f"Loss: {loss:.5f} | Duration: {duration:.2f} | Throughput: {throughput:.2f} tokens/sec"
        self.record(line, step=step, loss=loss, duration=duration, tokens_per_second=throughput, lr=lr)

    def log_eval(self, step: int, loss: float) -> None:
        """Log the mean loss of a label token of the held-out rows."""
        self.record(f"Held-out loss: {loss:.5f}", step=step, held_out_loss=loss)

    def skipped(self, step: int, problem: str) -> None:
        """Log a step that --skip-nonfinite skips."""
        self.record(f"{problem}: step skipped", step=step, skipped=problem)

    def best(self, step: int, loss: float) -> None:
        """Log whose weights --keep-best saves."""
        self.record(f"Best held-out loss: {loss:.5f}, saving these weights", step=step, best_held_out_loss=loss)
        self.best_point = step, loss

    def write_line(self, line: str) -> None:
        """Print a line above the bar, on standard output, so that it can be piped into a file."""
        with tqdm.external_write_mode(file=sys.stdout):
            print(line, flush=True)

    def record(self, line: str, **record) -> None:
        """Print the line with its step, and add the record to the file and to the curves."""
        self.write_line(f"[Step {record['step']}/{self.total_steps}] | {line}")
        record = {name: round_number(value) if isinstance(value, float) else value for name, value in record.items()}
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        self.report(record)

    def report(self, record: dict) -> None:
        """Add the numbers of a record to the curves."""
        numbers = {name: record[name] for name in CURVES if name in record}
        if self.reporter and numbers:
            self.reporter.report(record["step"], numbers)

    def draw(self) -> None:
        """Draw training_loss.png. Where that fails the training goes on: the trained model is still to be saved."""
        if not is_main_process():
            return
        try:
            draw_losses(self.records, self.directory / "training_loss.png", self.best_point)
        except ModuleNotFoundError as error:
            self.write_line(f"training_loss.png was not drawn: {install_hint(error.name)}")
        except Exception as error:
            self.write_line(f"training_loss.png was not drawn: {short_message(error)}")


class TensorBoard:
    """--report-to tensorboard: curves in the directory `tensorboard` of the save directory."""

    def __init__(self, save_dir: Path):
        from torch.utils.tensorboard import SummaryWriter

        for old in (save_dir / "tensorboard").glob("events.out.tfevents.*"):
            old.unlink()  # a resumed training reports all steps again
        self.writer = SummaryWriter(str(save_dir / "tensorboard"))

    def report(self, step: int, numbers: Dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # for somebody who looks during the training, and before a kill

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """--report-to wandb: a run of https://wandb.ai. WANDB_PROJECT names the project, WANDB_MODE=offline needs no
    account. A resumed training is a run of its own, with all steps from the first one."""

    def __init__(self, save_dir: Path):
        import wandb

        try:
            settings = wandb.Settings(console="off", quiet=True)  # it must not capture the terminal
            self.run = wandb.init(dir=save_dir, name=save_dir.name, settings=settings)
        except wandb.Error as error:
            raise UserError(
                f"--report-to wandb: {short_message(error)}. Run `wandb login` first, or set WANDB_MODE=offline."
            ) from None

    def report(self, step: int, numbers: Dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


REPORTERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Clock:
    """Seconds since the last log line, without pauses. It waits for the device before it is read."""

    def __init__(self, device, seconds: float):
        self.device = device
        self.start = perf_counter() - seconds

    def seconds(self) -> float:
        self.device.synchronize()
        return perf_counter() - self.start

    def restart(self) -> None:
        self.start = perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.device.synchronize()
        begin = perf_counter()
        try:
            yield
        finally:
            self.start += perf_counter() - begin


def run_facts(options: dict, dataset_meta: dict, device_name: str) -> dict:
    """What run.json says before the run has finished: everything that is needed to repeat it."""
    return {
        "command": sys.argv,
        "options": options,
        "made_of": base_models(options["model_name_or_path"]),
        "dataset": dataset_meta,
        "device": device_name,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
    }


def _commit() -> Optional[str]:
    """The commit of these scripts; None where they are not in a git checkout, or git is missing."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def has_window() -> bool:
    """Whether a progress bar follows the width of the window. In a notebook, `!` is a terminal without a size, and
    TQDM_NCOLS is the width."""
    return "TQDM_NCOLS" not in os.environ


def with_progress(parts: Iterable, count_rows: Callable, name: str, total: Optional[int], done: int = 0) -> Iterator:
    """Yield the parts, with a progress bar in rows, or a line every 30 seconds where there is no terminal.

    total: all rows, or None where that is not known; done: rows that an earlier run has done.
    """
    terminal = sys.stderr.isatty()
    start = monotonic()
    last_line = start
    rows = done
    bar = tqdm(total=total, initial=done, desc=name, unit="row", disable=not terminal, dynamic_ncols=has_window())
    with bar:
        for part in parts:
            yield part
            rows += count_rows(part)
            bar.update(count_rows(part))
            now = monotonic()
            if not terminal and now - last_line >= SECONDS:
                rate = (rows - done) / (now - start)
                left = f" of {total}, {(total - rows) / rate / 60:.0f} minutes left" if total else ""
                print(f"{name}: {rows} rows{left}, {rate:.1f} rows/s", flush=True)
                last_line = now


# ------------------------------------------------------------------------------------------------ pictures and tables


def draw_losses(records: List[dict], path: Path, best: Optional[Tuple[int, float]] = None) -> None:
    """Draw the losses of a log; best: step and loss of the saved weights, where they are not the last ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("held_out_loss", "held-out", "o--")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            steps, losses = zip(*points)
            axes.plot(steps, losses, style if len(points) > 1 else "o", label=label)  # one point makes no line
    if best:
        axes.plot(*best, "*", color="tab:red", markersize=14, label="saved")
    axes.set(xlabel="optimizer step", ylabel="loss per token", title="Loss")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with atomic_write(path) as new:
        figure.savefig(new, dpi=120)


def print_table(header: List[str], rows: List[List[str]], left: Sequence[int] = (0,)) -> None:
    """Print a table of texts. left: the numbers of its columns that are aligned to the left."""
    widths = [max(map(_width, column)) for column in zip(header, *rows)]
    for number, row in enumerate([header, *rows]):
        cells = []
        for column, text in enumerate(row):
            space = " " * (widths[column] - _width(text))
            cells.append(text + space if column in left else space + text)
        print("   ".join(cells).rstrip())
        if number == 0:
            print("-" * _width("   ".join(cells)))


def _width(text: str) -> int:
    """The columns that a text takes in a terminal: a Korean letter takes two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def round_number(value: float) -> float:
    """A measured number with six digits, as files and tables show it."""
    return float(f"{value:.6g}")


def print_answers(question: str, answers: Dict[str, str]) -> None:
    """Print a question, shortened where it is long, and below it the answers, {heading: text}."""
    if len(question) > MAX_QUESTION:
        half = MAX_QUESTION // 2
        question = f"{question[:half]} ... {question[-half:]}"
    print(f"\n{question}")
    for heading, text in answers.items():
        print(f"--- {heading} ---\n{text}")
