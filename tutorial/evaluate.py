"""Measure a model on held-out rows, before and after its training: a table, and a picture beside the trained model.

python tutorial/evaluate.py
python tutorial/evaluate.py --model-name-or-path ./llama2_summarization --rows 256 --batch-rows 32
python tutorial/evaluate.py --model-name-or-path ./my_model --base-model-name-or-path ./my_base \
    --dataset-name-or-path ./my_dataset.pt

Base and dataset file are those that the training's run.json names, where they are not given. The rows are the first of
the held-out ones, as for the training's held-out loss. What is measured was written into the dataset file when it was
prepared; --measure chooses another:

always     perplexity: exp of the mean loss of an answer token. Only models of one tokenizer can be compared by it.
           ends by itself: the answers that stop before --max-new-tokens.
code       parses: it is Python (where the answer has a fenced block: what that holds) and not empty.
           defines what was asked: where the data's answer defines functions or classes at its top level, so does this
           one; those that the prompt names by their names, else one of the same kind. Rows without any don't count.
           No code is run: what parses may still be wrong.
summary    ROUGE-1, -2 and -L, F1 (Lin 2004, https://aclanthology.org/W04-1013/). Words are letters and digits of any
           alphabet, Hangul too, between two other characters; English ones are stemmed, as rouge-score does it.
           ROUGE-L takes the whole summary as one sequence; papers often print ROUGE-Lsum, by sentence, which is higher.
text       exact match: the answer is the data's, each run of white space as one space; and without any white space.
           chrF2 of the letters (Popovic 2015, https://aclanthology.org/W15-3049/), over all answers together, as
           sacrebleu gives it. It says how much of the data's words an answer has, not whether it is right.

Answers are greedy. A share p of n rows is known to about 2 * sqrt(p * (1 - p) / n), of 64 rows to 12 points. Where the
data has a column "kind", exact answers are counted for each kind. Some answers are shown side by side, the wrong ones
first: they teach. All of them go to evaluation.json: read them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, List, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import Parser, add_bits, find_base_and_dataset, non_negative_int, positive_int
from common.support.exit import UserError, run
from common.support.files import atomic_write, require_writable
from common.support.model_dir import ModelSource

# Of an answer to print; evaluation.json has all of it.
MAX_LINES = 5
MAX_LETTERS = 400
MAX_LETTERS_IN_A_LINE = 80


def arguments():
    """The options; base and dataset file, where they are not given, as the training had them."""
    parser = Parser(__doc__)
    add = parser.add_argument
    model = "directory of the trained model or adapter"
    add("--model-name-or-path", default="./smollm2_korean_numbers", help=model)
    add("--base-model-name-or-path", help="the model before the training (default: as run.json beside the model says)")
    add("--dataset-name-or-path", help="dataset file with the held-out rows (default: as run.json says)")
    add("--save-dir", help="directory for evaluation.json and evaluation.png (default: that of the model)")
    measures = ["code", "summary", "text"]
    add("--measure", choices=measures, help="what to measure of the answers (default: as the dataset file says)")
    add("--rows", type=positive_int, default=64, help="held-out rows to use at most")
    add("--batch-rows", type=positive_int, default=8, help="questions asked at once, fewer need less memory")
    add("--max-new-tokens", type=positive_int, default=256, help="tokens of an answer at most")
    add("--show", type=non_negative_int, default=4, help="rows whose answers are printed, half of them wrong ones")
    add_bits(parser, "load the models, or the adapter's base, in 4 bit")
    args = parser.parse_args()
    find_base_and_dataset(args)
    model_dir = args.model_name_or_path
    args.save_dir = args.save_dir or (model_dir if Path(model_dir).is_dir() else ".")
    require_writable(args.save_dir, "--save-dir")
    return args


def main():
    args = arguments()

    # Here and below, what imports torch is imported late: --help and a mistyped option are answered at once.
    from common.device import start_device
    from dataset.scores import MEASURES, compare_scores, exact_by_kind

    device = start_device(seed=0)
    rows = load_rows(args, device)
    measure = MEASURES[args.measure or rows.meta["measure"]]
    measure([""], [""], [""])  # A missing package is reported before the work.

    before, after = ask_both(args, device, rows)

    report = {"command": sys.argv, "options": vars(args), "dataset": rows.meta, "device": device.name}
    report["measures"] = compare_scores(measure, rows.questions, rows.references, before, after)
    report["answers"] = compare_answers(rows, before[1], after[1])
    report["kinds"] = exact_by_kind(rows.meta.get("kinds", []), report["answers"])
    save(report, Path(args.save_dir))  # before it is printed: `| head` may have closed the output
    show(report, args.show, rows.title, measure.__doc__)


class Rows(NamedTuple):
    """The rows on which the models are measured."""

    meta: dict  # of the dataset file
    title: str  # of the table
    tokenizer: Any
    batches: Any  # all rows as a training takes them, for the perplexity
    prompts: List[List[int]]  # what a model is asked, in token ids
    questions: List[str]  # the same as text
    references: List[str]  # the data's answers


def load_rows(args, device) -> Rows:
    """The first held-out rows of the dataset file, which must fit both models."""
    from common.batches import Batches
    from common.dataset_file import held_out_prompts, load_dataset
    from common.tokenization import load_tokenizer_of_both

    tokenizer = load_tokenizer_of_both(args.model_name_or_path, args.base_model_name_or_path)
    dataset = load_dataset(args.dataset_name_or_path, tokenizer)
    meta = dataset["meta"]
    rows = held_out_prompts(dataset, args.dataset_name_or_path, tokenizer, args.rows)
    prompts = [prompt for prompt, _ in rows]
    static_length = meta["block_size"] if device.static_shapes else 0
    return Rows(
        meta=meta,
        title=title_of_rows(args, meta),
        tokenizer=tokenizer,
        batches=Batches(dataset["validation"], args.batch_rows, device.micro_batch_tokens, static_length),
        prompts=prompts,
        questions=[tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts],
        references=[reference for _, reference in rows],
    )


def title_of_rows(args, meta: dict) -> str:
    """What the table says of its rows: they are held out only where the model was trained on this file alone.

    UserError where the file of the training was prepared again: other rows are held out now.
    """
    model, file = args.model_name_or_path, args.dataset_name_or_path
    source = ModelSource(model)
    if source.has_not_seen(meta):
        return f"{model}, held-out rows of {file}:"
    has_changed = source.run.get("dataset", {}).get("sha256") != meta["sha256"]
    if has_changed and file == source.run.get("options", {}).get("dataset_name_or_path"):
        raise UserError(
            f"{file} has changed since the training of {model}, so its held-out rows may be rows that were trained on. "
            "Prepare it as for the training, train again, or give another file with --dataset-name-or-path."
        )
    return f"{model}, rows of {file} (which it may have learned from another file):"


def ask_both(args, device, rows: Rows):
    """What `ask` returns of the base, and of the trained model.

    The base is asked by itself: with an adapter that is switched off it may be another model (bias, PiSSA).
    """
    from model.load import load_model
    from model.lora import load_adapter

    source = ModelSource(args.model_name_or_path)
    is_its_base = source.is_adapter and Path(source.base).resolve() == Path(args.base_model_name_or_path).resolve()
    bits = source.base_bits if is_its_base and args.bits is None else args.bits
    model = load_model(args.base_model_name_or_path, device.torch_device, device.dtype, bits)
    before = ask(model, args, device, rows, "before")
    if is_its_base:
        model = load_adapter(model, args.model_name_or_path)
    else:
        model = None  # Only one of the two models is in memory.
        model = load_model(args.model_name_or_path, device.torch_device, device.dtype, args.bits)
    return before, ask(model, args, device, rows, "after")


def ask(model, args, device, rows: Rows, when: str):
    """The perplexity of a model, and its answers to all rows: (text, whether it ended by itself) each."""
    from common.train_log import with_progress
    from model.generate import generate_in_batches, perplexity

    mean_perplexity = perplexity(model, rows.batches, len(rows.prompts), device)
    parts = generate_in_batches(model, rows.tokenizer, rows.prompts, args, rows.meta["end_tokens"])
    parts = with_progress(parts, lambda part: part.rows, when, len(rows.prompts))
    return mean_perplexity, [(answer.text.strip(), answer.ended) for part in parts for answer in part.answers]


def compare_answers(rows: Rows, before: List[tuple], after: List[tuple]) -> List[dict]:
    """The two answers to each row beside the data's; `exact` and `ended` are of the answer before, and after.

    before, after: (text, whether it ended by itself) of each row.
    """
    from dataset.scores import plain

    answers = []
    for prompt, reference, (old, old_ended), (new, new_ended) in zip(rows.questions, rows.references, before, after):
        texts = {"prompt": prompt, "reference": reference, "before": old, "after": new}
        exact = [plain(old) == plain(reference), plain(new) == plain(reference)]
        answers.append({**texts, "exact": exact, "ended": [old_ended, new_ended]})
    return answers


def save(report: dict, directory: Path) -> None:
    """Write evaluation.json and evaluation.png."""
    from dataset.scores import draw_table

    with atomic_write(directory / "evaluation.json") as new:
        new.write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    draw_table(report["measures"], report["kinds"], directory / "evaluation.png")


def show(report: dict, rows: int, title: str, description: str) -> None:
    """Print the begins of the answers to some `rows` questions, what was measured, and the tables."""
    from common.train_log import print_answers, print_table
    from dataset.scores import table_rows

    answers = report["answers"]
    questions = without_frame([row["prompt"] for row in answers])
    for number in some_rows(answers, rows):
        row = answers[number]
        texts = {"Before": row["before"], "After": row["after"], "Answer in the data": row["reference"]}
        if "\n" in row["reference"]:
            print_answers(row["prompt"].strip(), {name: begin_of(text) for name, text in texts.items()})
        else:
            print(f"\n{'right' if row['exact'][1] else 'WRONG':<18}   {questions[number]}")
            for name, text in texts.items():
                print(f"{name:<18}   {one_line(text)}")
    print("\n" + " ".join(description.split()))
    print(f"\n{title}")
    print_table(["Measure", "Before", "After", "Rows"], table_rows(report["measures"]))
    if report["kinds"]:
        print()
        counts = [[kind, *map(str, counts.values())] for kind, counts in report["kinds"].items()]
        print_table(["Exact by kind", "Before", "After", "Rows"], counts)
    print(f"Saved in {report['options']['save_dir']}: evaluation.json, evaluation.png")


def some_rows(answers: List[dict], count: int) -> List[int]:
    """The numbers of `count` rows: wrong ones first, and as many right ones."""
    right = [number for number, row in enumerate(answers) if row["exact"][1]]
    wrong = [number for number, row in enumerate(answers) if not row["exact"][1]]
    num_right = min(len(right), (count + 1) // 2)
    return (wrong[: count - num_right] + right)[:count]


def without_frame(prompts: List[str]) -> List[str]:
    """The prompts without the lines with which all of them begin and end, those of the template."""
    before = os.path.commonprefix(prompts).rfind("\n") + 1
    after = os.path.commonprefix([prompt[::-1] for prompt in prompts]).rfind("\n") + 1
    return [prompt[before : len(prompt) - after].strip() or prompt for prompt in prompts]


def one_line(answer: str) -> str:
    """The first letters of an answer, in a line."""
    line = " ".join(answer.split())
    begin = line[:MAX_LETTERS_IN_A_LINE]
    return begin if begin == line else f"{begin} ..."


def begin_of(answer: str) -> str:
    """The first lines of an answer."""
    begin = "\n".join(answer[:MAX_LETTERS].split("\n")[:MAX_LINES])
    return begin if begin == answer else f"{begin} ..."


if __name__ == "__main__":
    run(main)
