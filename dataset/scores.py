"""How good the answers of a model are: measures of one answer, and the table and picture of their means.

A measure takes the prompt, the data's answer (the reference) and the model's answer, all as text, and returns
{name: percent}, or None instead of the percent where the row does not ask for it. MEASURES says which belong to which
template.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from pathlib import Path
from typing import Callable, Dict, List, Optional

from common.support.files import atomic_write

PERPLEXITY = "Perplexity (lower is better)"
ENDED = "Ends by itself (%)"
Scores = Dict[str, Optional[float]]


def rouge(prompt: str, reference: str, answer: str) -> Scores:
    """ROUGE: F1 of the words, pairs of words, longest common subsequence that the answer shares with the data's."""
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, answer)
    return {f"ROUGE-{name[5:]} (F1, %)": 100 * score.fmeasure for name, score in scores.items()}


def code(prompt: str, reference: str, answer: str) -> Scores:
    """Parses: the answer is Python, and not empty. Defines what was asked: where the data's answer defines functions or
    classes, so does this one, those that the prompt names by their names, else one of the same kind."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\d" and the like
            body = ast.parse(code_block(answer)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a null byte; brackets nested too deep
        body = []
    kinds = {ast.FunctionDef: "def", ast.AsyncFunctionDef: "def", ast.ClassDef: "class"}
    defined = {(kinds[type(node)], node.name) for node in body if type(node) in kinds}
    # Not by ast: the reference may have been truncated to fit its row.
    wanted = set(re.findall(r"^(?:async +)?(def|class) +(\w+)", code_block(reference), re.MULTILINE))
    by_name = r"\b(def|class|function|method|named|called)\s+[`'\"]?{0}\b|`{0}\b|\b{0}\("
    named = {(kind, name) for kind, name in wanted if re.search(by_name.format(name), prompt)}
    right = named <= defined if named else bool({kind for kind, _ in wanted} & {kind for kind, _ in defined})
    return {"Parses (%)": 100.0 * bool(body), "Defines what was asked (%)": 100.0 * right if wanted else None}


def code_block(text: str) -> str:
    """The first fenced block of Python, which may lack its end; all of `text` if it has none."""
    blocks = re.findall(r"```(\w*)[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return next((block for language, block in blocks if language.lower() in ("", "py", "python", "python3")), text)


def chrf(prompt: str, reference: str, answer: str) -> Scores:
    """chrF: F2 of the letters, and runs of up to six, that the answer shares with the data's, white space apart."""
    from sacrebleu.metrics import CHRF

    return {"chrF (letters, %)": CHRF().sentence_score(answer, [reference]).score}


# The measures of a prompt template. Conversations and templates that are not listed have those of "others".
MEASURES: Dict[str, List[Callable[[str, str, str], Scores]]] = {
    "summarization": [rouge],
    "alpaca": [code],
    "instruction": [code],
    "others": [chrf],
}


def measures_for(template: str) -> List[Callable[[str, str, str], Scores]]:
    """The measures for answers to prompts of that template."""
    return MEASURES.get(template, MEASURES["others"])


def compare_scores(measures, prompts: List[str], references: List[str], before, after) -> Dict[str, dict]:
    """{measure: {"before", "after", "rows" that it is the mean of}} of the same rows.

    before, after: the perplexity of a model, and its answers, (text, whether it ended by itself) each.
    """
    table = {PERPLEXITY: {"before": before[0], "after": after[0], "rows": len(prompts)}}
    for when, (_, answers) in (("before", before), ("after", after)):
        scores: Dict[str, List[float]] = {}
        for prompt, reference, (answer, ended) in zip(prompts, references, answers):
            found: Scores = {}
            for measure in measures:
                found.update(measure(prompt, reference, answer))
            found[ENDED] = 100.0 * ended
            for name, percent in found.items():
                scores.setdefault(name, []).extend([] if percent is None else [percent])
        for name, values in scores.items():
            if values:
                table.setdefault(name, {"rows": len(values)})[when] = sum(values) / len(values)
    return table


def format_value(measure: str, value: float) -> str:
    return f"{value:.2f}" if measure == PERPLEXITY else f"{value:.1f}"


def print_table(table: Dict[str, dict]) -> None:
    """Print {measure: {"before", "after", "rows"}} as a table."""
    print(f"{'Measure':<28} {'Before':>8} {'After':>7} {'Rows':>6}")
    for name, values in table.items():
        before, after = (format_value(name, values[when]) for when in ("before", "after"))
        print(f"{name:<28} {before:>8} {after:>7} {values['rows']:>6}")


def draw_table(table: Dict[str, dict], path: Path) -> None:
    """Draw two bars, before and after, for each measure of the table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * len(table), 4))
    all_axes = figure.subplots(1, len(table), squeeze=False)[0]
    for axes, (name, values) in zip(all_axes, table.items()):
        heights = [values["before"], values["after"]]
        bars = axes.bar(["before", "after"], heights, color=["tab:gray", "tab:blue"])
        axes.bar_label(bars, [format_value(name, height) for height in heights], padding=2)
        axes.set_title(f"{textwrap.fill(name, 18)}\n{values['rows']} rows", fontsize="medium")
        axes.margins(y=0.12)
    figure.tight_layout()
    with atomic_write(path) as new:
        figure.savefig(new, dpi=120)
