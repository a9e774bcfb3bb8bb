"""What a reader sees of a training: progress bar, log lines, training_log.jsonl, training_loss.png, run.json."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from time import monotonic, perf_counter
from typing import Callable, Dict, Iterable, Iterator, List, Optional

import torch
from tqdm import tqdm

from common.distributed import is_main_process
from common.support.exit import install_hint
from common.support.files import atomic_write, fsync
from common.support.model_dir import base_models

ROOT = Path(__file__).resolve().parents[1]


class TrainingLog:
    """Writes a training's log as it goes on: to the terminal, and to `training_log.jsonl` in `save_dir`.

    step, records: those of a training that goes on after a cut; what it wrote after its checkpoint is written again.
    Of several processes the first one alone writes.
    """

    def __init__(self, save_dir: str, total_steps: int, step: int, records: List[dict]):
        self.directory = Path(save_dir)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.total_steps, self.records, self.best_point = total_steps, records, None
        self.writes = is_main_process()
        self.file = open(self.directory / "training_log.jsonl" if self.writes else os.devnull, "w", encoding="utf-8")
        self.file.writelines(json.dumps(record) + "\n" for record in records)
        self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        self.file.close()
        if self.writes:
            fsync(self.directory / "training_log.jsonl")

    def training_loss(self, step: int, loss: float, duration: float, tokens: int, lr: float) -> None:
        """What happened since the last line: the mean loss of a label token, seconds, tokens (padding not counted)."""
        throughput = tokens / duration
        words = f"Loss: {loss:.5f} | Duration: {duration:.2f} | Throughput: {throughput:.2f} tokens/sec"
        self._tell(words, step=step, loss=loss, duration=duration, tokens_per_second=throughput, lr=lr)

    def held_out_loss(self, step: int, loss: float) -> None:
        """The mean loss of a label token of the held-out rows."""
        self._tell(f"Held-out loss: {loss:.5f}", step=step, held_out_loss=loss)

    def skipped(self, step: int, problem: str) -> None:
        """A step that --skip-nonfinite has left out."""
        self._tell(f"{problem}: this step is left out", step=step, skipped=problem)

    def best(self, step: int, loss: float) -> None:
        """Of --keep-best: the step whose weights are saved."""
        self._tell(f"Best held-out loss: {loss:.5f}, of the weights that are saved", step=step, best_held_out_loss=loss)
        self.best_point = step, loss

    def say(self, words: str) -> None:
        """Print a line above the bar, on standard output, so that it can be piped into a file."""
        with tqdm.external_write_mode(file=sys.stdout):
            print(words, flush=True)

    def _tell(self, words: str, **record) -> None:
        self.say(f"[Step {record['step']}/{self.total_steps}] | {words}")
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def draw(self) -> None:
        """Draw training_loss.png."""
        if not self.writes:
            return
        try:
            draw_losses(self.records, self.directory / "training_loss.png", self.best_point)
        except ModuleNotFoundError as error:
            print(f"training_loss.png was not drawn: {install_hint(error.name)}")
        except Exception as error:  # a picture is not worth a trained model, which is saved after this
            print(f"training_loss.png was not drawn: {error}")


class Clock:
    """The seconds of the log line under way, without the pauses; it waits for the device, to tell the truth."""

    def __init__(self, device, seconds: float):
        self.device = device
        self.start = perf_counter() - seconds

    def seconds(self) -> float:
        self.device.synchronize()
        return perf_counter() - self.start

    def restart(self) -> None:
        self.start = perf_counter()

    @contextmanager
    def paused(self):
        self.device.synchronize()
        begin = perf_counter()
        try:
            yield
        finally:
            self.start += perf_counter() - begin


def facts_of_run(options: dict, dataset_meta: dict, device: str) -> dict:
    """What run.json says, besides when the run finished: everything that is needed to run the same again."""
    return {
        "command": sys.argv,
        "options": options,
        "made_of": base_models(options["model_name_or_path"]),
        "dataset": dataset_meta,
        "device": device,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
    }


def draw_losses(records: list, path: Path, best: Optional[tuple] = None) -> None:
    """A picture of the losses: of the training batches, and of the held-out rows where there are any; best: (step,
    loss) of the weights that are saved, where those are not the last."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for key, label, style in (("loss", "training", "-"), ("held_out_loss", "held-out", "o--")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points), style, label=label)
    if best:
        axes.plot(*best, "*", color="tab:red", markersize=14, label="saved")
    axes.set(xlabel="optimizer step", ylabel="loss per token", title="Loss")
    axes.xaxis.get_major_locator().set_params(integer=True)  # there is no step 2.5
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    _save(figure, path)


def draw_before_and_after(measures: Dict[str, dict], digits: Callable[[str], str], path: Path) -> None:
    """Bars before and after a training, {measure: {"before", "after", "rows"}}; the first has a scale of its own."""
    plt = _pyplot()
    panels = [names for names in ([*measures][:1], [*measures][1:]) if names]
    widths = [len(names) for names in panels]
    size, ratios = (2.5 + 1.6 * sum(widths), 4.5), {"width_ratios": widths}
    figure, row_of_axes = plt.subplots(1, len(panels), figsize=size, gridspec_kw=ratios, squeeze=False)
    for axes, names in zip(row_of_axes[0], panels):
        for when, colour, shift in (("before", "tab:gray", -0.2), ("after", "tab:blue", 0.2)):
            places = [place + shift for place in range(len(names))]
            bars = axes.bar(places, [measures[name][when] for name in names], 0.38, color=colour, label=when)
            axes.bar_label(bars, fmt=digits(names[0]), padding=2)
        axes.set_xticks(range(len(names)))
        axes.set_xticklabels([f"{name}\n{measures[name]['rows']} rows" for name in names])
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.margins(y=0.12)
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)
    title = "Held-out rows, before and after the training"
    figure.legend(*axes.get_legend_handles_labels(), title=title, loc="upper center", ncol=2, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.88))  # below the legend
    _save(figure, path)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")  # a server has no screen
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: Path) -> None:
    with atomic_write(path) as new:
        figure.savefig(new, dpi=120)
    _pyplot().close(figure)


def _commit():
    """The commit of these scripts; None where they are not in a git checkout, or git is missing."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


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


SECONDS = 30  # from one line to the next


def with_progress(parts: Iterable, rows_in: Callable, name: str, total: Optional[int], done: int = 0) -> Iterator:
    """`parts`, one after the other, each of as many rows as `rows_in` says; told once whoever takes them has used it.

    total: rows in all, where that is known; done: those that were done before.
    """
    from tqdm import tqdm

    terminal, start, before = sys.stderr.isatty(), monotonic(), done
    last = start
    with tqdm(total=total, initial=done, desc=name, unit=" rows", disable=not terminal, dynamic_ncols=True) as bar:
        for part in parts:
            yield part
            done += rows_in(part)
            bar.update(rows_in(part))
            now = monotonic()
            if not terminal and now - last >= SECONDS:
                rate = (done - before) / (now - start)
                left = f" of {total}, {(total - done) / rate / 60:.0f} minutes left" if total else ""
                print(f"{name}: {done} rows{left}, {rate:.{0 if rate >= 10 else 1}f} rows/s", flush=True)
                last = now


LONGEST = 600  # letters of a question that are shown: an article is longer


def print_measures(measures: Dict[str, dict], digits: Callable[[str], str]) -> None:
    """A line each measure, {name: {"before", "after", "rows"}}; `digits` gives the format of its values."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table("Measure", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("Before", "After", "Rows"):
        table.add_column(heading, justify="right")
    for name, values in measures.items():
        before, after = (digits(name) % values[when] for when in ("before", "after"))
        table.add_row(name.replace("\n", " "), before, after, str(values["rows"]))
    Console().print(table)


def print_answers(question: str, answers: Dict[str, str]) -> None:
    """A column each answer, {heading: text}, below the question."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if len(question) > LONGEST:
        question = question[: LONGEST // 2] + " ... " + question[-LONGEST // 2 :]
    table = Table(title=Text(question), title_justify="left")
    for heading in answers:
        table.add_column(heading, ratio=1, overflow="fold")
    table.add_row(*map(Text, answers.values()))  # as Text, because rich reads [INST] as its markup
    Console().print(table)
