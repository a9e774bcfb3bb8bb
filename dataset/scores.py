"""How good the answers of a model are: measures of code, of summaries and of other text, their table and picture.

A measure takes the prompts, the data's answers (the references) and the model's answers, all as text, and returns
{name: (score, number of rows that it is the score of)}. MEASURES has one for each kind of data.
"""

from __future__ import annotations

import ast
import re
import textwrap
import unicodedata
import warnings
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

from common.support.files import atomic_write
from common.train_log import round_number

PERPLEXITY = "Perplexity (lower is better)"
ENDED = "Ends by itself (%)"
Scores = Dict[str, Tuple[float, int]]


def summary(prompts: List[str], references: List[str], answers: List[str]) -> Scores:
    """ROUGE: F1 of the words, pairs of words, longest common subsequence that the answer shares with the data's.
    Words are letters and digits of any alphabet (Hangul too) between two other characters; English ones are stemmed."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=RougeWords())
    rows = [scorer.score(reference, answer) for reference, answer in zip(references, answers)]
    return {
        f"ROUGE-{name[5:]} (F1, %)": _mean([100 * row[name].fmeasure for row in rows]) for name in scorer.rouge_types
    }


class RougeWords:
    """The tokenizer for rouge-score. Its own one takes all but a-z and 0-9 for white space: no Korean word is left."""

    def __init__(self):
        from rouge_score.tokenizers import DefaultTokenizer

        self.english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> List[str]:
        words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text).lower())
        stemmed = [self.english.tokenize(word) if word.isascii() else [word] for word in words]
        return [word for parts in stemmed for word in parts]


def code(prompts: List[str], references: List[str], answers: List[str]) -> Scores:
    """Parses: the answer is Python, and not empty. Defines what was asked: where the data's answer defines functions or
    classes, so does this one, those that the prompt names by their names, else one of the same kind."""
    parses = []
    defines = []
    for prompt, reference, answer in zip(prompts, references, answers):
        body = parse(code_block(answer))
        parses.append(100.0 * bool(body))
        right = defines_what_was_asked(prompt, reference, body)
        if right is not None:
            defines.append(100.0 * right)
    scores = {"Parses (%)": _mean(parses)}
    if defines:
        scores["Defines what was asked (%)"] = _mean(defines)
    return scores


def parse(text: str) -> List[ast.stmt]:
    """The statements of Python code; none where it is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\d" and the like
            return ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a null byte; brackets nested too deep
        return []


def defines_what_was_asked(prompt: str, reference: str, body: List[ast.stmt]) -> Optional[bool]:
    """Whether an answer with these statements defines what the reference does; None where that defines nothing."""
    kinds = {ast.FunctionDef: "def", ast.AsyncFunctionDef: "def", ast.ClassDef: "class"}
    defined = {(kinds[type(node)], node.name) for node in body if type(node) in kinds}
    # Not by ast: the reference may have been truncated to fit its row.
    wanted = set(re.findall(r"^(?:async +)?(def|class) +(\w+)", code_block(reference), re.MULTILINE))
    if not wanted:
        return None
    by_name = r"\b(def|class|function|method|named|called)\s+[`'\"]?{0}\b|`{0}\b|\b{0}\("
    named = {(kind, name) for kind, name in wanted if re.search(by_name.format(name), prompt)}
    if named:
        return named <= defined
    return bool({kind for kind, _ in wanted} & {kind for kind, _ in defined})


def code_block(text: str) -> str:
    """The first fenced block of Python, which may lack its end; all of `text` if it has none."""
    blocks = re.findall(r"```(\w*)[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return next((block for language, block in blocks if language.lower() in ("", "py", "python", "python3")), text)


def text(prompts: List[str], references: List[str], answers: List[str]) -> Scores:
    """Exact match: the answer is the data's, each run of white space taken as one space; without spaces: the letters
    are the same. chrF: F2 of the letters, and runs of up to six, that all answers together share with the data's."""
    from sacrebleu.metrics import CHRF

    pairs = [(plain(reference), plain(answer)) for reference, answer in zip(references, answers)]
    same_letters = [reference.replace(" ", "") == answer.replace(" ", "") for reference, answer in pairs]
    return {
        "Exact match (%)": _mean([100.0 * (reference == answer) for reference, answer in pairs]),
        "Exact without spaces (%)": _mean([100.0 * same for same in same_letters]),
        "chrF (letters, %)": (CHRF().corpus_score(answers, [references]).score, len(answers)),
    }


def plain(text: str) -> str:
    """`text` with composed letters (NFC), its ends stripped, and each run of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_by_kind(kinds: List[str], answers: List[dict]) -> Dict[str, dict]:
    """{kind: {"before": how many answers are exact, "after", "rows" of this kind}}, the worst kind first.

    answers: {"exact": (before, after)} of each row.
    """
    table: Dict[str, dict] = {}
    for kind, answer in zip(kinds, answers):
        counts = table.setdefault(kind, {"before": 0, "after": 0, "rows": 0})
        counts["rows"] += 1
        for when, exact in zip(("before", "after"), answer["exact"]):
            counts[when] += exact
    return dict(sorted(table.items(), key=lambda item: item[1]["after"] / item[1]["rows"]))


def _mean(values: List[float]) -> Tuple[float, int]:
    return sum(values) / len(values), len(values)


MEASURES: Dict[str, Callable[[List[str], List[str], List[str]], Scores]] = {
    "code": code,
    "summary": summary,
    "text": text,
}


def compare_scores(measure: Callable, prompts: List[str], references: List[str], before, after) -> Dict[str, dict]:
    """{name: {"before", "after", "rows" that it is the score of}} of the same rows.

    before, after: the perplexity of a model, and its answers, (text, whether it ended by itself) each.
    """
    table: Dict[str, dict] = {}
    for when, (perplexity, answers) in (("before", before), ("after", after)):
        scores = measure(prompts, references, [text for text, _ in answers])
        scores[PERPLEXITY] = (perplexity, len(answers))
        scores[ENDED] = _mean([100.0 * ended for _, ended in answers])
        for name, (score, rows) in scores.items():
            table.setdefault(name, {"rows": rows})[when] = round_number(score)
    return table


def format_score(name: str, score: float) -> str:
    return f"{score:.2f}" if name == PERPLEXITY else f"{score:.1f}"


def table_rows(table: Dict[str, dict]) -> List[List[str]]:
    """The rows of the printed table: name, before, after, rows."""
    return [
        [name, format_score(name, values["before"]), format_score(name, values["after"]), str(values["rows"])]
        for name, values in table.items()
    ]


def draw_table(table: Dict[str, dict], kinds: Dict[str, dict], path: Path) -> None:
    """Draw two bars, before and after, for each measure of the table, and below them for each kind of rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * len(table), 7 if kinds else 4), layout="constrained")
    parts = figure.subfigures(2 if kinds else 1, 1, squeeze=False)[:, 0]
    all_axes = parts[0].subplots(1, len(table), squeeze=False)[0]
    for axes, (name, values) in zip(all_axes, table.items()):
        heights = [values["before"], values["after"]]
        bars = axes.bar(["before", "after"], heights, color=["tab:gray", "tab:blue"])
        axes.bar_label(bars, [format_score(name, height) for height in heights], padding=2)
        axes.set_title(f"{textwrap.fill(name, 18)}\n{values['rows']} rows", fontsize="medium")
        axes.margins(y=0.12)
    if kinds:
        axes = parts[1].subplots()
        for place, when, colour in ((-0.2, "before", "tab:gray"), (0.2, "after", "tab:blue")):
            shares = [100.0 * counts[when] / counts["rows"] for counts in kinds.values()]
            bars = axes.bar([number + place for number in range(len(kinds))], shares, 0.4, color=colour, label=when)
            axes.bar_label(bars, [f"{counts[when]}/{counts['rows']}" for counts in kinds.values()], padding=2)
        axes.set_xticks(range(len(kinds)), list(kinds))
        axes.set_title("Exact answers by kind (%)", fontsize="medium")
        axes.margins(y=0.12)
        axes.legend(loc="upper left")
    with atomic_write(path) as new:
        figure.savefig(new, dpi=120)
