"""How good an answer is: words or letters shared with the data's answer, or Python that parses and defines what was
asked.

What judges an answer takes the texts of prompt, the data's answer and the model's, and gives {measure: percent, or None
where the row doesn't ask for it}.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import Callable, Dict, List, Optional

PERPLEXITY = "Perplexity\n(lower is better)"
Scores = Dict[str, Optional[float]]


def score_of(template: str) -> Callable[[str, str, str], Scores]:
    """What judges answers to prompts of that template: of one that is not known here, and of conversations, chrF."""
    if template == "summarization":
        return rouge_score()
    return code_score if template in ("alpaca", "instruction") else chrf_score()


def chrf_score() -> Callable[[str, str, str], Scores]:
    from sacrebleu.metrics import CHRF  # missing, it is told now and not after all answers

    scorer = CHRF()

    def chrf(prompt: str, reference: str, answer: str) -> Scores:
        """chrF: F2 of the letters, and runs of up to six, that the answer shares with the data's, white space apart."""
        return {"chrF\n(letters, %)": scorer.sentence_score(answer, [reference]).score}

    return chrf


def rouge_score() -> Callable[[str, str, str], Scores]:
    from rouge_score.rouge_scorer import RougeScorer  # missing, it is told now and not after all answers

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)

    def rouge(prompt: str, reference: str, answer: str) -> Scores:
        """ROUGE: F1 of the words, pairs of words, longest common subsequence that the answer shares with the data's."""
        found = scorer.score(reference, answer)
        return {f"ROUGE-{name[5:]}\n(F1, %)": 100 * found[name].fmeasure for name in names}

    return rouge


def code_score(prompt: str, reference: str, answer: str) -> Scores:
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


def measures_of(score, prompts: List[str], references: List[str], before, after) -> Dict[str, dict]:
    """{measure: {"before", "after", "rows" that it is of}}; before and after are what perplexity_and_answers gives."""
    measures = {PERPLEXITY: {"before": before[0], "after": after[0], "rows": len(prompts)}}
    for when, (_, answers) in (("before", before), ("after", after)):
        found: Dict[str, List[float]] = {}
        for (answer, ended), prompt, reference in zip(answers, prompts, references):
            for name, value in {**score(prompt, reference, answer), "Ends by itself\n(%)": 100.0 * ended}.items():
                found.setdefault(name, []).extend([] if value is None else [value])
        for name, values in found.items():
            if values:
                measures.setdefault(name, {"rows": len(values)})[when] = sum(values) / len(values)
    return measures


def digits(measure: str) -> str:
    """How a value of that measure is printed."""
    return "%.2f" if measure == PERPLEXITY else "%.1f"
