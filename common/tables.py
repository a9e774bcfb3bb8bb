"""Tables for the terminal: measures before and after a training, and answers to one question side by side."""

from __future__ import annotations

from typing import Callable, Dict

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
