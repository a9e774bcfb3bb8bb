"""Measure a model on held-out rows, before and after its training: a table, and a picture beside the trained model.

python tutorial/evaluate.py
python tutorial/evaluate.py --model-name-or-path ./llama2_summarization --rows 256 --batch-rows 32
python tutorial/evaluate.py --model-name-or-path ./my_model --base-model-name-or-path ./my_base \
    --dataset-name-or-path ./my_dataset.pt

Base and dataset file are those that the training's run.json names, where they are not given. The rows are the first of
the held-out ones, as for the training's held-out loss. What is measured goes by the template of the dataset file:

all        perplexity: exp of the mean loss of an answer token. Only models of one tokenizer can be compared by it.
summaries  ROUGE-1, -2 and -L, F1 (Lin 2004, https://aclanthology.org/W04-1013/), words stemmed, for English only.
           ROUGE-L takes the whole summary as one sequence; papers often print ROUGE-Lsum, by sentence, which is higher.
code       parses: it is Python (where the answer has a fenced block: what that holds) and not empty.
           defines what was asked: where the data's answer defines functions or classes at its top level, so does this
           one; those that the prompt names by their names, else one of the same kind. Rows without any don't count.
           No code is run: what parses may still be wrong.

Answers are greedy; code and summaries are also counted that end by themselves. A share p of n rows is known to about
2 * sqrt(p * (1 - p) / n), of 64 rows to 12 points. All answers go to evaluation.json: read them.
"""

from __future__ import annotations

import ast
import json
import math
import re
import sys
import warnings
from pathlib import Path
from typing import Dict, List, Optional, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from common import UserError
from common.accelerator import start_accelerator
from common.arguments import evaluate_arguments
from common.dataset_cache import load_dataset
from common.download import base_of, require_model
from common.tokenization import fingerprint, load_tokenizer
from common.training import Batches, total_loss
from model.generation import answer_ids, prompt_room
from model.loading import load_model
from model.loss import CausalLMLoss

PERPLEXITY = "Perplexity\n(lower is better)"
Scores = Dict[str, Optional[float]]  # of one answer, in %; None where the row doesn't ask for it


def main():
    args = evaluate_arguments(__doc__, model_name_or_path="./smollm2_code_generation")
    complete(args)
    accelerator = start_accelerator(seed=0)
    tokenizer = load_tokenizer(args.model_name_or_path)
    dataset = load_dataset(args.dataset_name_or_path, tokenizer)
    meta, rows = dataset["meta"], dataset["validation"]
    if fingerprint(load_tokenizer(args.base_model_name_or_path)) != meta["tokenizer"]:
        raise UserError(
            f"{args.base_model_name_or_path} has another tokenizer than {args.model_name_or_path}: it can't have been "
            "its base. Give the right one with --base-model-name-or-path."
        )
    if not len(rows["answer_starts"]):
        raise UserError(f"{args.dataset_name_or_path} has no held-out rows. Prepare it from 20 rows or more.")
    score = {"summarization": rouge, "alpaca": code, "instruction": code}.get(meta["template"])
    if score:
        score("", "", "")  # a package that is missing shows now, and not after all answers

    prompts, references = [], []
    for row in range(min(args.rows, len(rows["answer_starts"]))):
        ids = rows["input_ids"][rows["offsets"][row] : rows["offsets"][row + 1]].tolist()
        start = int(rows["answer_starts"][row])
        prompts.append(ids[:start])
        references.append(tokenizer.decode(ids[start:], skip_special_tokens=True).strip())
    args.train_on_prompt, args.micro_batch_tokens, args.block_size = False, 0, meta["block_size"]
    batches = Batches(rows, args, args.batch_rows, accelerator)

    def ask(model, when):
        return measure(model, tokenizer, batches, prompts, args.max_new_tokens if score else 0, when)

    def load(directory):
        return load_model(directory, accelerator.device, accelerator.dtype, args.bits)

    if base_of(args.model_name_or_path) == args.base_model_name_or_path != args.model_name_or_path:
        model = load(args.model_name_or_path)
        with model.disable_adapter():  # the same weights, asked without what was learned
            before = ask(model, "before")
        after = ask(model, "after")
    else:  # one after the other: only one of the two is in memory
        before = ask(load(args.base_model_name_or_path), "before")
        after = ask(load(args.model_name_or_path), "after")

    texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    one, other = (scores(*result, texts, references, score) for result in (before, after))
    measures = {
        name: {"before": value, "after": other[name][0], "rows": rows} for name, (value, rows) in one.items() if rows
    }
    print(f"{args.model_name_or_path}, held-out rows of {args.dataset_name_or_path}:")
    print_table(measures)
    if score:
        print(" ".join(score.__doc__.split()))  # what the measures are

    directory = Path(args.save_dir)
    directory.mkdir(parents=True, exist_ok=True)
    report = {"command": sys.argv, "options": vars(args), "dataset": meta, "device": accelerator.name}
    report["measures"] = {name.replace("\n", " "): values for name, values in measures.items()}
    report["answers"] = [
        {"prompt": prompt, "reference": reference, "before": old, "after": new}
        for prompt, reference, (old, _), (new, _) in zip(texts, references, before[1], after[1])
    ]
    (directory / "evaluation.json").write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    draw(measures, directory / "evaluation.png")
    print(f"Saved in {args.save_dir}: evaluation.json, evaluation.png")


def complete(args) -> None:
    """Fill in what was not given: base and dataset file, as the training had them."""
    model_dir = args.model_name_or_path
    require_model(model_dir)
    try:
        trained = json.loads((Path(model_dir) / "run.json").read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError, TypeError):  # another tool's model
        trained = {}
    base = base_of(model_dir) if base_of(model_dir) != model_dir else trained.get("model_name_or_path")
    args.base_model_name_or_path = args.base_model_name_or_path or base
    args.dataset_name_or_path = args.dataset_name_or_path or trained.get("dataset_name_or_path")
    for option in ("--base-model-name-or-path", "--dataset-name-or-path"):
        if not getattr(args, option[2:].replace("-", "_")):
            raise UserError(f"{model_dir} has no run.json that tells how it was trained: give {option}.")
    require_model(args.base_model_name_or_path, "give the model before the training with --base-model-name-or-path")


def measure(
    model, tokenizer, batches: Batches, prompts: List[List[int]], max_new_tokens: int, when: str
) -> Tuple[float, List[Tuple[str, bool]]]:
    """The perplexity of the first rows, and to each prompt (token ids) the answer and whether it ended by itself.

    No answers where `max_new_tokens` is 0.
    """
    if max(map(len, prompts)) > prompt_room(model, max_new_tokens):
        raise UserError(f"--max-new-tokens {max_new_tokens} leaves no room for the longest prompt. Take fewer.")
    loss_module = CausalLMLoss(model, static_shapes=batches.accelerator.static_shapes)
    loss, answers = 0.0, {}
    # prompts of like length together; the longest first, so that too little memory shows at once
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    with tqdm(total=len(order), desc=when, unit="row", dynamic_ncols=True) as bar:
        for start in range(0, len(order), batches.batch_size):
            rows = order[start : start + batches.batch_size]
            loss += total_loss(loss_module, batches, rows)
            if max_new_tokens:
                answers.update(zip(rows, answer(model, tokenizer, [prompts[row] for row in rows], max_new_tokens)))
            bar.update(len(rows))
    return math.exp(loss / int(batches.labels[order].sum())), [answers[row] for row in sorted(answers)]


def answer(model, tokenizer, prompts: List[List[int]], max_new_tokens: int) -> List[Tuple[str, bool]]:
    """The likeliest answer to each prompt, and whether it ended by itself."""
    answers = answer_ids(model, tokenizer, prompts, max_new_tokens)
    return [(tokenizer.decode(ids, skip_special_tokens=True).strip(), tokenizer.eos_token_id in ids) for ids in answers]


def scores(
    perplexity: float, answers: List[Tuple[str, bool]], prompts: List[str], references: List[str], score
) -> Dict[str, Tuple[float, int]]:
    """{measure: (its mean, rows that it is of)}"""
    found: Dict[str, List[float]] = {}
    for (answer, ended), prompt, reference in zip(answers, prompts, references):
        for name, value in {**score(prompt, reference, answer), "Ends by itself\n(%)": 100.0 * ended}.items():
            found.setdefault(name, []).extend([] if value is None else [value])
    means = {name: (sum(values) / max(1, len(values)), len(values)) for name, values in found.items()}
    return {PERPLEXITY: (perplexity, len(prompts)), **means}


def rouge(prompt: str, reference: str, answer: str) -> Scores:
    """ROUGE: F1 of the words, pairs of words, longest common subsequence that the answer shares with the data's."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("ROUGE needs rouge-score: pip install rouge-score") from None
    names = ("rouge1", "rouge2", "rougeL")
    found = RougeScorer(names, use_stemmer=True).score(reference, answer)
    return {f"ROUGE-{name[5:]}\n(F1, %)": 100 * found[name].fmeasure for name in names}


def code(prompt: str, reference: str, answer: str) -> Scores:
    """Parses: the answer is Python, and not empty. Defines what was asked: where the data's answer defines functions or
    classes, so does this one, those that the prompt names by their names, else one of the same kind."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\d" and the like
            body = ast.parse(code_of(answer)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a null byte; brackets nested too deep
        body = []
    kinds = {ast.FunctionDef: "def", ast.AsyncFunctionDef: "def", ast.ClassDef: "class"}
    defined = {(kinds[type(node)], node.name) for node in body if type(node) in kinds}
    # not by ast: the reference may have been cut to fit its row
    wanted = set(re.findall(r"^(?:async +)?(def|class) +(\w+)", code_of(reference), re.MULTILINE))
    by_name = r"\b(def|class|function|method|named|called)\s+[`'\"]?{0}\b|`{0}\b|\b{0}\("
    named = {(kind, name) for kind, name in wanted if re.search(by_name.format(name), prompt)}
    right = named <= defined if named else bool({kind for kind, _ in wanted} & {kind for kind, _ in defined})
    return {
        "Parses\n(%)": 100.0 * bool(body),
        "Defines what\nwas asked (%)": 100.0 * right if wanted else None,
    }


def code_of(text: str) -> str:
    """The first fenced block of Python, which may lack its end; all of `text` where it has none."""
    blocks = re.findall(r"```(\w*)[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return next((block for language, block in blocks if language.lower() in ("", "py", "python", "python3")), text)


def print_table(measures: dict) -> None:
    table = Table("Measure", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("Before", "After", "Rows"):
        table.add_column(heading, justify="right")
    for name, values in measures.items():
        before, after = (digits(name) % values[when] for when in ("before", "after"))
        table.add_row(name.replace("\n", " "), before, after, str(values["rows"]))
    Console().print(table)


def digits(name: str) -> str:
    return "%.2f" if name == PERPLEXITY else "%.1f"


def draw(measures: dict, path: Path) -> None:
    """Bars before and after the training: perplexity with a scale of its own, everything else in percent."""
    import matplotlib

    matplotlib.use("Agg")  # a server has no screen
    import matplotlib.pyplot as plt

    panels = [names for names in ([PERPLEXITY], [name for name in measures if name != PERPLEXITY]) if names]
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
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
