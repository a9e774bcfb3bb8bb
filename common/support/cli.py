"""The options of all scripts: what they are, the defaults that depend on other options, and which are refused."""

from __future__ import annotations

import argparse
import math
import re
import sys
from importlib import import_module
from pathlib import Path
from shlex import quote
from typing import Callable
from unicodedata import normalize

from common.support.compat import add_switch
from common.support.exit import UserError, install_hint, world_size
from common.support.files import require_writable
from common.support.model_dir import ModelSource, require_model


class Parser(argparse.ArgumentParser):
    """Shows the script's docstring as it is written and the default of each option; errors are one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=_HelpFormatter)
        for word in sys.argv[1:]:
            if re.search("[\ud800-\udfff]", word):  # bytes in another encoding
                self.error(f"{word!r} is not UTF-8 text: set the terminal to UTF-8, or rename the file")

    def set_defaults(self, **defaults):
        known = {action.dest for action in self._actions}
        for name in defaults:
            if name not in known:  # argparse would take a mistyped name for a new one
                raise TypeError(f"{self.prog} has no option for the default {name}")
        super().set_defaults(**defaults)

    def error(self, message: str):
        raise UserError(f"{message}. The options: python {quote(sys.argv[0])} --help")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if action.default is None or action.dest == "bits" or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


def _number(kind, least):
    """An argparse type: a finite number of `kind` that is `least` or more."""

    def parse(text: str):
        value = kind(text)
        if not (value >= least and math.isfinite(value)):  # NaN is neither
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {least} or more, and finite")
        return value

    parse.__name__ = kind.__name__  # argparse shows it where `text` is no number
    return parse


positive_int = _number(int, 1)
non_negative_int = _number(int, 0)
non_negative_float = _number(float, 0)
positive_float = _number(float, 0.001)

TRACKERS = {"tensorboard": "tensorboard.summary.writer.event_file_writer", "wandb": "wandb"}


def _tracker(name: str) -> str:
    """An argparse type: what --report-to can be. UserError where the package is not installed, or not all of it."""
    if name not in TRACKERS:
        raise argparse.ArgumentTypeError(f"{name!r} is not known, choose {' or '.join(TRACKERS)}")
    try:
        import_module(TRACKERS[name])
    except ImportError:
        raise UserError(f"--report-to {name}: {install_hint(name)}") from None
    return name


def add_bits(group, help: str) -> None:
    """`args.bits`: 4 or 8, or 0 for a model that is not quantized; None where none of the options is given."""
    add = group.add_mutually_exclusive_group().add_argument
    add("--load-in-4bit", dest="bits", action="store_const", const=4, help=help)
    add("--load-in-8bit", dest="bits", action="store_const", const=8, help="the same in 8 bit")
    add("--no-quantization", dest="bits", action="store_const", const=0, help="neither 4 nor 8 bit")


# ------------------------------------------------------------------------------------------------ download_*, prepare_*


def download_arguments(description: str, model_name: str, save_dir: str) -> argparse.Namespace:
    """Options of `download_*`: model_name, save_dir, token, tiny."""
    parser = Parser(description)
    add = parser.add_argument
    add("--model-name", default=model_name, help="the model's id on the hub")
    add("--save-dir", default=save_dir, help="directory for the model and its tokenizer")
    add("--token", help="your Hugging Face token, for a gated model (or use `hf auth login`, or set HF_TOKEN)")
    add("--tiny", action="store_true", help="write a tiny random model instead, to rehearse without a download")
    return parser.parse_args()


def prepare_arguments(description: str, **defaults) -> argparse.Namespace:
    """Options of `prepare_*`: model_name_or_path, dataset_name_or_path, block_size, save_path, columns, show.

    defaults: those of the first four, which differ from tutorial to tutorial. columns: {name in the template: column}.
    """
    parser = Parser(description)
    add = parser.add_argument
    add("--model-name-or-path", help="directory with the tokenizer")
    data = "hub id, .jsonl/.json/.csv/.parquet file, or folder with train and validation files"
    add("--dataset-name-or-path", help=data)
    add("--block-size", type=positive_int, help="maximum tokens per example")
    add("--save-path", help="the dataset file to write")
    _add_columns(parser)
    add("--show", type=non_negative_int, default=0, help="examples to print first, as the model will see them")
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    args.columns = _column_names(args.columns, parser)
    if Path(args.save_path).is_dir():
        raise UserError(f"{args.save_path} is a directory, not a dataset file. Choose another --save-path.")
    require_writable(Path(args.save_path).parent, "--save-path")
    return args


def _add_columns(parser: Parser) -> None:
    columns = "the template's names for your columns: instruction=question output=answer"
    parser.add_argument("--columns", nargs="+", action="extend", default=[], metavar="NAME=COLUMN", help=columns)


def _column_names(pairs: list, parser: Parser) -> dict:
    """{name that the template asks for: name in the data}, both with whole letters (Unicode NFC), as rows have them."""
    pairs = [normalize("NFC", pair) for pair in pairs]
    columns = {}
    for pair in pairs:
        name, _, column = pair.partition("=")
        if not name or not column:
            parser.error(f"--columns {pair}: give NAME=COLUMN, the template's name and that of your data")
        if name in columns:
            parser.error(f"--columns {' '.join(pairs)}: {name} is there twice; give it once")
        columns[name] = column
    return columns


# ------------------------------------------------------------------------------------------------ train_*


def train_arguments(
    description: str, lr: float, lora_lr: float = 2e-4, hint: str = "", **defaults
) -> argparse.Namespace:
    """Options of `train_*`, all of them resolved and checked; UserError, which ends with `hint`, without a model.

    lr: the default learning rate of full fine-tuning; lora_lr: of LoRA. defaults: of other options, by their names;
    a script gives at least model_name_or_path, dataset_name_or_path, save_dir, batch_size and log_interval.
    `args.bits` is 4 or 8 for a quantized base model, else 0. `args.gradient_checkpointing` is None for auto.
    """
    epochs = defaults.pop("epochs", 1)
    max_train_steps = defaults.pop("max_train_steps", 0)
    bits = defaults.pop("bits", 0)
    parser = Parser(description)
    _add_data_options(parser)
    _add_training_options(parser, lr, lora_lr, epochs, max_train_steps)
    _add_memory_options(parser, bits)
    _add_logging_options(parser)
    _add_checkpoint_options(parser)
    parser.set_defaults(**defaults)
    args = parser.parse_args()

    # Defaults that depend on other options.
    source = ModelSource(args.model_name_or_path)
    lora = _values_of_adapter(args, source) if source.is_adapter else {**LORA_DEFAULTS, "bits": bits}
    for name, value in lora.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lr is None:
        args.lr = lora_lr if args.use_lora else lr
    if args.max_train_steps is None:  # --epochs alone changes the length of a tutorial that counts in steps
        args.max_train_steps = 0 if args.epochs else max_train_steps
    args.epochs = args.epochs or epochs
    args.gradient_checkpointing = {"auto": None, "on": True, "off": False}[args.gradient_checkpointing]

    _check_train_arguments(args, source, parser)
    require_model(args.model_name_or_path, hint)
    return args


def _add_data_options(parser: Parser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--model-name-or-path", help="directory of the model to fine-tune")
    add("--dataset-name-or-path", help="dataset file written by prepare_*")
    spellings = ("--save-dir", "--save-model-dir", "--save-path", "--model-save-path")
    add(*spellings, help="directory for the trained model, its log and its loss curve")
    add("--block-size", type=positive_int, default=1024, help="maximum tokens per example")
    add("--train-on-prompt", action="store_true", help="compute the loss on the prompt too, not on the answer alone")


def _add_training_options(parser: Parser, lr: float, lora_lr: float, epochs: int, max_train_steps: int) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--epochs", type=positive_int, help=f"passes over the training data (default: {epochs})")
    steps = f"optimizer steps, instead of epochs (default: {max_train_steps or 'by the epochs'})"
    add("--max-train-steps", type=positive_int, help=steps)
    add("--batch-size", type=positive_int, help="examples per optimizer step (all GPUs together)")
    # LoRA starts from zero matrices and needs a larger learning rate than full fine-tuning.
    add("--lr", type=non_negative_float, help=f"learning rate (default: {lr}, with --use-lora {lora_lr})")
    add("--lr-scheduler", choices=["constant", "linear", "cosine"], default="constant", help="after the warm-up")
    add("--warmup-steps", type=non_negative_int, default=0, help="steps in which the learning rate rises from 0")
    add("--weight-decay", type=non_negative_float, default=0.01, help="of matrices; norms and biases have none")
    add("--max-grad-norm", type=non_negative_float, default=1.0, help="clip gradients to this norm; 0: do not clip")
    add("--seed", type=int, default=0, help="of the order of examples, of new weights, and of dropout")
    add_switch(group, "deterministic", True, "the same seed gives the same result, bit by bit, on one machine")
    add("--skip-nonfinite", type=non_negative_int, default=0, help="steps with a NaN loss that may be skipped")


LORA_DEFAULTS = {"lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}


def _add_memory_options(parser: Parser, bits: int) -> None:
    group = parser.add_argument_group("LoRA and memory")
    add = group.add_argument
    tokens = "tokens per forward and backward pass; fewer need less memory; 0: 4096, on a CPU 1024, or what fits"
    add("--micro-batch-tokens", type=non_negative_int, default=0, help=tokens)
    checkpointing = "recompute activations in the backward pass: less memory, slower; auto: where it is needed"
    switch = {"nargs": "?", "const": "on", "choices": ["auto", "on", "off"], "default": "auto"}
    add("--gradient-checkpointing", **switch, help=checkpointing)
    off = {"action": "store_const", "const": "off", "help": argparse.SUPPRESS}
    add("--no-gradient-checkpointing", dest="gradient_checkpointing", **off)
    add_switch(group, "use-lora", False, "train and save a LoRA adapter, the base model stays frozen")
    # Their defaults come after parsing: an adapter that is trained further has its own.
    r, alpha, dropout, layers = (f"(default: {value})" for value in LORA_DEFAULTS.values())
    add("--lora-r", type=positive_int, help=f"rank of the LoRA matrices {r}")
    add("--lora-alpha", type=non_negative_float, help=f"their product is multiplied by alpha / r {alpha}")
    add("--lora-dropout", type=non_negative_float, help=f"dropout on the inputs of the LoRA matrices {dropout}")
    target = f"names of layers, or all-linear: every linear layer but the output layer {layers}"
    add("--lora-target-modules", nargs="+", metavar="NAME", help=target)
    by_default = " (the default here)" if bits == 4 else ""
    add_bits(group, f"load the frozen base model in 4 bit, with --use-lora{by_default}")


def _add_logging_options(parser: Parser) -> None:
    add = parser.add_argument_group("logging").add_argument
    add("--log-interval", type=positive_int, help="steps between two log lines")
    add("--eval-step", type=non_negative_int, default=0, help="steps between two held-out losses; 0: first and last")
    add("--eval-rows", type=non_negative_int, default=256, help="maximum held-out examples; 0: none")
    add("--report-to", type=_tracker, metavar="|".join(TRACKERS), help="where to send the log too, as curves")


def _add_checkpoint_options(parser: Parser) -> None:
    group = parser.add_argument_group("checkpoints (run the same command again to resume)")
    add = group.add_argument
    add("--save-steps", type=non_negative_int, default=0, help="steps between checkpoints; 0: about every 30 minutes")
    add("--save-total-limit", type=positive_int, default=1, help="checkpoints to keep")
    add("--restart", action="store_true", help="start over even if an interrupted run could be resumed")
    add_switch(group, "keep-best", False, "save the weights with the lowest held-out loss instead of the last ones")


def _check_train_arguments(args: argparse.Namespace, source: ModelSource, parser: Parser) -> None:
    if args.bits and not args.use_lora:
        parser.error(
            f"--load-in-{args.bits}bit without --use-lora: weights in {args.bits} bit can't be trained, only used. "
            "Add --use-lora, or --no-quantization to train all weights"
        )
    if args.lora_dropout >= 1:
        parser.error(f"--lora-dropout {args.lora_dropout} drops everything: it must be less than 1")
    if args.keep_best and not (args.eval_step and args.eval_rows):
        parser.error("--keep-best needs held-out losses to compare: give --eval-step, and --eval-rows above 0")
    if args.batch_size < world_size():
        parser.error(
            f"--batch-size {args.batch_size} has fewer examples than there are processes ({world_size()}): "
            f"give --batch-size {world_size()} or more, or start fewer processes"
        )
    require_writable(args.save_dir, "--save-dir")  # now, and not after hours of training
    for model in (source.path, source.base):
        if Path(args.save_dir).resolve() == Path(model).resolve():
            raise UserError(f"--save-dir {args.save_dir} is the model directory, which would be lost. Choose another.")


def _values_of_adapter(args: argparse.Namespace, source: ModelSource) -> dict:
    """The values of LoRA's options of the adapter that is trained further. UserError where it cannot be trained."""
    adapter = source.path
    if not args.use_lora:
        raise UserError(
            f"{adapter} is an adapter. Add --use-lora to continue its training. To train all weights, merge it with "
            f"its base model first: python tutorial/merge_adapter.py --model-name-or-path {quote(adapter)}"
        )
    for name in ("lora_r", "lora_alpha", "lora_target_modules"):
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for a new adapter, and {adapter} is one already, which is trained "
                "further. Leave the option out, or train a new adapter on its base model."
            )
    config = source.adapter_config
    layers = config.get("target_modules")
    if not isinstance(layers, list) or config.get("target_parameters"):
        layers = LORA_DEFAULTS["lora_target_modules"]  # only all-linear makes an expression, or adapts experts
    values = {
        "lora_r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "lora_target_modules": source.run.get("options", {}).get("lora_target_modules") or sorted(layers),
        "bits": source.base_bits or 0,
    }
    if config.get("peft_type") != "LORA" or not isinstance(values["lora_r"], int):
        raise UserError(f"{adapter}/adapter_config.json is not of LoRA or is damaged: train the adapter again")
    return values


def memory_saving_options(args: argparse.Namespace) -> list:
    """The options of a train script that need less memory and are not in `args` yet."""
    options = []
    if not args.use_lora:
        options.append("--use-lora")
    if args.bits != 4:
        options.append("--load-in-4bit")
    if args.gradient_checkpointing is not True:
        options.append("--gradient-checkpointing")
    return options


# ------------------------------------------------------------------------------------------------ inference_*


def inference_arguments(
    description: str, template: Callable, model_name_or_path: str, hint: str = ""
) -> argparse.Namespace:
    """Options of `inference_*`: model_name_or_path, prompt, prompt_file, save_path, columns, batch_rows,
    max_new_tokens, temperature, seed, bits, and system with the template `chat`.

    UserError, which ends with `hint`, without a model, or if it was trained with another template than `template`.
    `prompt` is the text of --prompt or of --prompt-file, or None: the script then takes its own sample. With
    `save_path` the file has many prompts, which dataset.questions reads. `bits` is None unless given: a model is
    loaded as it is stored, the base model of an adapter as in its training.
    """
    parser = Parser(description)
    add = parser.add_argument
    add("--model-name-or-path", default=model_name_or_path, help="directory of the trained model or adapter")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="your own text; the prompt template of the training is put around it")
    text.add_argument("--prompt-file", help="a file with your own text; with --save-path a .jsonl file of many")
    add("--save-path", metavar="ANSWERS.jsonl", help="answer each row of --prompt-file, and save the answers here")
    _add_columns(parser)
    rows = "rows of --prompt-file that are answered together; fewer need less memory"
    add("--batch-rows", type=positive_int, default=8, help=rows)
    if template.__name__ == "chat":
        add("--system", help="system message: how the model shall answer")
    add("--max-new-tokens", type=positive_int, default=256, help="maximum tokens of an answer")
    temperature = "0: always the most likely token (greedy); above 0: sampled"
    add("--temperature", type=non_negative_float, default=0.0, help=temperature)
    add("--seed", type=int, default=0, help="for sampling")
    add_bits(parser, "load the model, or the adapter's base model, in 4 bit")
    args = parser.parse_args()
    if args.save_path and not args.prompt_file:
        parser.error(f"--save-path {args.save_path} is for the answers to a file of prompts: give --prompt-file")
    if args.save_path and not args.save_path.endswith(".jsonl"):  # its run.json would be that of another file
        parser.error(f"--save-path {args.save_path}: answers are JSON lines, give a name that ends in .jsonl")
    if args.columns and not args.save_path:
        parser.error("--columns is for a file of prompts: give --prompt-file and --save-path")
    args.columns = _column_names(args.columns, parser)
    if args.prompt_file and not args.save_path:
        args.prompt = _text_of_file(args.prompt_file, parser)
    require_model(args.model_name_or_path, hint, template)
    return args


def _text_of_file(path: str, parser: Parser) -> str:
    if Path(path).suffix.lower() == ".jsonl":
        parser.error(f"--prompt-file {path} has a prompt on each line: give --save-path for their answers")
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        parser.error(f"--prompt-file {path} can't be read, save it as UTF-8 text: {error}")
    if not text or "\0" in text:
        parser.error(f"--prompt-file {path} can't be read or is empty: save it as UTF-8 text")
    return text


# ------------------------------------------------------------------------------------------------ evaluate, web_demo


def find_base_and_dataset(args: argparse.Namespace) -> None:
    """Set base_model_name_or_path and dataset_name_or_path, where they are not given, to those of the model's run.json.

    UserError where nothing says them, and unless both models are there.
    """
    model_dir = args.model_name_or_path
    require_model(model_dir)
    source = ModelSource(model_dir)
    trained = source.run.get("options", {})
    base = source.base if source.is_adapter else trained.get("model_name_or_path")
    args.base_model_name_or_path = args.base_model_name_or_path or base
    args.dataset_name_or_path = args.dataset_name_or_path or trained.get("dataset_name_or_path")
    for option in ("--base-model-name-or-path", "--dataset-name-or-path"):
        if not getattr(args, option[2:].replace("-", "_")):
            raise UserError(f"{model_dir} has no run.json that tells how it was trained: give {option}.")
    require_model(args.base_model_name_or_path, "give the model before the training with --base-model-name-or-path")
