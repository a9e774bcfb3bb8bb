"""What the options of all scripts have in common: how they are shown, checked and refused."""

from __future__ import annotations

import argparse
import math
import re
import sys
from importlib import import_module

from common import UserError, missing_package


class Parser(argparse.ArgumentParser):
    """The script's docstring as it is written, each option's default where it has one, and errors of one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=_HelpFormatter)
        for word in filter(re.compile("[\ud800-\udfff]").search, sys.argv[1:]):  # bytes in another encoding
            self.error(f"{word!r} is not UTF-8 text: set the terminal to UTF-8, or rename the file")

    def set_defaults(self, **defaults):
        unknown = set(defaults) - {action.dest for action in self._actions}
        if unknown:  # argparse would take a mistyped name for a new one
            raise TypeError(f"{self.prog} has no option for the default {min(unknown)}")
        super().set_defaults(**defaults)

    def error(self, message: str):
        raise UserError(f"{message}. The options: python {sys.argv[0]} --help")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        shown = action.default is not None and action.dest != "bits" and "default" not in action.help
        return super()._get_help_string(action) if shown else action.help


def at_least(least, kind, more: bool = False):
    """An argparse type: a number of `kind` that is `least` or more, one clear line otherwise; `more`: not `least`."""
    bound = f"more than {least}" if more else f"{least} or more"

    def parse(text: str):
        value = kind(text)
        if not least <= value < math.inf or (more and value == least):  # NaN fails as well
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bound}, and finite")
        return value

    parse.__name__ = kind.__name__
    return parse


COUNT, COUNT_OR_NONE, NUMBER = at_least(1, int), at_least(0, int), at_least(0, float)
ABOVE_ZERO = at_least(0, float, more=True)


def tensorboard(text: str) -> str:
    """An argparse type: the one thing that --report-to can be. UserError where not all of it is installed."""
    if text != "tensorboard":
        raise argparse.ArgumentTypeError(f"{text!r} is not known: there is tensorboard")
    try:
        import_module("tensorboard.summary.writer.event_file_writer")  # by which torch's SummaryWriter writes
    except ImportError:
        raise UserError(f"--report-to tensorboard: {missing_package('tensorboard')}") from None
    return text


def add_switch(group, name: str, default: bool, help: str) -> None:
    """`--name` and `--no-name`, as argparse has them itself since Python 3.9."""
    group.add_argument(f"--{name}", action="store_true", default=default, help=f"{help}; --no-{name} turns it off")
    dest = name.replace("-", "_")
    group.add_argument(f"--no-{name}", dest=dest, action="store_false", default=default, help=argparse.SUPPRESS)


def add_bits(group, help: str) -> None:
    """`args.bits`: 4 or 8, 0 for a model as it is stored; None where it is not given."""
    choice = group.add_mutually_exclusive_group()

    def add(name, const, help):
        choice.add_argument(name, dest="bits", action="store_const", const=const, help=help)

    add("--load-in-4bit", 4, help)
    add("--load-in-8bit", 8, "the same in 8 bit")
    add("--no-quantization", 0, "neither of the two")
