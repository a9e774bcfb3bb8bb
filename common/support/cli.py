"""What the options of all scripts have in common: how they are shown, checked and refused."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from importlib import import_module
from pathlib import Path

from common.support.exit import UserError, install_hint, world_size
from common.support.files import require_writable
from common.support.model_dir import adapter_facts, base_of, run_of


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


positive_int, non_negative_int, non_negative_float = at_least(1, int), at_least(0, int), at_least(0, float)
positive_float = at_least(0, float, more=True)


def reporter(name: str) -> str:
    """An argparse type: what --report-to can be. UserError where not all of it is installed."""
    # the one of tensorboard is what torch's SummaryWriter imports
    modules = {"tensorboard": "tensorboard.summary.writer.event_file_writer", "wandb": "wandb"}
    if name not in modules:
        raise argparse.ArgumentTypeError(f"{name!r} is not supported: use tensorboard or wandb")
    try:
        import_module(modules[name])
    except ImportError:
        raise UserError(f"--report-to {name}: {install_hint(name)}") from None
    return name


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


DEFAULTS = {"lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}
FIXED = ("lora_r", "lora_alpha", "lora_target_modules")  # of matrices that are there


def of_adapter(args) -> dict:
    """{option: value} of the adapter whose directory `args.model_name_or_path` is, to be trained further.

    Its matrices have their r, their alpha and their places; its base is in the bits in which it was, and the dropout is
    as it was, where `args` ask for nothing else. UserError where they ask for other matrices, or for a training of all
    weights, of which an adapter has none.
    """
    directory = args.model_name_or_path
    if not args.use_lora:
        raise UserError(
            f"{directory} is an adapter. --use-lora trains it further; to train all weights, make one model of it and "
            f"its base first: python tutorial/merge_adapter.py --model-name-or-path {directory}"
        )
    config = json.loads((Path(directory) / "adapter_config.json").read_text("utf-8"))  # base_of has found it whole
    values = _values(directory, config)
    for name in FIXED:
        given, value = getattr(args, name), values[name]
        if given is not None and not _same(given, value, config):
            told = [" ".join(map(str, some)) if isinstance(some, list) else some for some in (given, value)]
            raise UserError(
                f"--{name.replace('_', '-')} {told[0]}: the adapter {directory}, which is trained further, has "
                f"{told[1]}. Leave the option out, or train a new adapter on its base."
            )
    return values


def _values(directory: str, config: dict) -> dict:
    if config.get("peft_type") != "LORA":
        raise UserError(f"The adapter {directory} is of the kind {config.get('peft_type')}: only LoRA is trained here.")
    trained = run_of(directory).get("options", {})
    values = {
        "lora_r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "lora_target_modules": trained.get("lora_target_modules") or _names(config),
        "bits": int(adapter_facts(directory).get("base_bits", 0)),
    }
    if not all(isinstance(values[name], (int, float)) for name in ("lora_r", "lora_alpha", "lora_dropout")):
        raise UserError(f"{directory}/adapter_config.json is damaged: train the adapter again")
    return values


def _same(given, value, config: dict) -> bool:
    if not isinstance(given, list):
        return given == value
    return sorted(given) in (sorted(value), _names(config))


def _names(config: dict) -> list:
    """Of the layers that have matrices. By an expression, or with experts, all-linear has made them."""
    names = config.get("target_modules")
    named = isinstance(names, list) and not config.get("target_parameters")
    return sorted(names) if named else DEFAULTS["lora_target_modules"]


SWITCH = {"auto": None, "on": True, "off": False}
HIDDEN = argparse.SUPPRESS  # the opposite of an option needs no line of its own in --help


def download_arguments(description: str, model_name: str, save_dir: str) -> argparse.Namespace:
    """Options of `download_*`: model_name, save_dir, token, tiny."""
    parser = Parser(description)
    parser.add_argument("--model-name", default=model_name, help="the model's id on the hub")
    parser.add_argument("--save-dir", default=save_dir, help="directory for the model and its tokenizer")
    parser.add_argument("--token", help="your Hugging Face token, for a gated model (else: login cache, HF_TOKEN)")
    parser.add_argument("--tiny", action="store_true", help="write a small stand-in with random weights, to rehearse")
    return parser.parse_args()


def prepare_arguments(description: str, **defaults) -> argparse.Namespace:
    """Options of `prepare_*`, of each of which a script gives the default: model_name_or_path, dataset_name_or_path,
    block_size, save_path."""
    parser = Parser(description)
    add = parser.add_argument
    add("--model-name-or-path", help="directory with the tokenizer")
    add(
        "--dataset-name-or-path",
        help="hub id, .jsonl/.json/.csv/.parquet file, or folder with train and validation files",
    )
    add("--block-size", type=positive_int, help="tokens of a row at most")
    add("--save-path", help="the dataset file to write")
    renamed = "names that the template asks for, and those of your columns: instruction=question output=answer"
    add("--columns", nargs="+", action="extend", default=[], metavar="NAME=COLUMN", help=renamed)
    add("--show", type=non_negative_int, default=0, help="rows to print first, as the model will see them")
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    for pair in args.columns:
        if not all(pair.partition("=")):
            parser.error(f"--columns {pair}: give NAME=COLUMN, the template's name and that of your data")
    columns = dict(pair.split("=", 1) for pair in args.columns)
    if len(columns) < len(args.columns):
        parser.error(f"--columns {' '.join(args.columns)}: a name is there twice; give it once")
    args.columns = columns
    path = Path(args.save_path)
    if path.is_dir():
        raise UserError(f"{path} is a directory, so no dataset file can have that name. Give another --save-path.")
    require_writable(path.parent, "--save-path")
    return args


def train_arguments(description: str, lr: float, lora_lr: float = 2e-4, **defaults) -> argparse.Namespace:
    """Options of `train_*`. `defaults`, named as the options, are what differs from one tutorial to the next.

    A script gives model_name_or_path, dataset_name_or_path, save_dir, batch_size and log_interval at least. `bits`: 4
    or 8 for a quantized base (--load-in-4bit, --load-in-8bit), which needs LoRA; else 0.
    """
    parser = Parser(description)
    epochs, steps = defaults.pop("epochs", 1), defaults.pop("max_train_steps", 0)

    data = parser.add_argument_group("data")
    data.add_argument("--model-name-or-path", help="directory of the model to fine-tune")
    data.add_argument("--dataset-name-or-path", help="dataset file written by prepare_*")
    spellings = ("--save-dir", "--save-model-dir", "--save-path", "--model-save-path")
    data.add_argument(*spellings, dest="save_dir", help="directory for the trained model, its log and its loss picture")
    data.add_argument("--block-size", type=positive_int, default=1024, help="tokens of a row at most")
    data.add_argument("--train-on-prompt", action="store_true", help="loss on the prompt as well as on the answer")

    training = parser.add_argument_group("training")
    add = training.add_argument
    # where a tutorial's length is a number of steps, --epochs alone must still be able to change it
    add("--epochs", type=positive_int, help=f"times to go through the data (default: {epochs})")
    add("--max-train-steps", type=positive_int, help=f"steps, in place of epochs (default: {steps or 'by the epochs'})")
    add("--batch-size", type=positive_int, help="rows of an optimizer step")
    # matrices that start at zero need far larger steps than weights that are nearly right
    add("--lr", type=non_negative_float, help=f"learning rate (default: {lr}, with --use-lora {lora_lr})")
    add("--lr-scheduler", choices=["constant", "linear", "cosine"], default="constant", help="after the warm-up")
    add("--warmup-steps", type=non_negative_int, default=0, help="steps in which the learning rate rises")
    add("--weight-decay", type=non_negative_float, default=0.01, help="of matrices; norms and biases have none")
    add(
        "--max-grad-norm",
        type=non_negative_float,
        default=1.0,
        help="gradients are clipped to this norm; 0: not clipped",
    )
    add("--seed", type=int, default=0, help="of the order of rows, and of new weights")
    add_switch(training, "deterministic", True, "one seed, one result, to the last bit on one machine")

    memory = parser.add_argument_group("LoRA and memory")
    add = memory.add_argument
    tokens = "tokens on the device at once, less needs less memory; 0: 4096, on a CPU 1024, or less where that fits"
    add("--micro-batch-tokens", type=non_negative_int, default=0, help=tokens)
    twice = "compute activations twice, less memory, slower: on, off, or auto, where the memory is too small without"
    add("--gradient-checkpointing", nargs="?", const="on", choices=[*SWITCH], default="auto", help=twice)
    add("--no-gradient-checkpointing", dest="gradient_checkpointing", action="store_const", const="off", help=HIDDEN)
    add_switch(memory, "use-lora", False, "train small matrices beside frozen weights, and save only those")
    # None: not given. An adapter that is trained further has its own
    r, alpha, dropout, layers = (f"(default: {value})" for value in DEFAULTS.values())
    add("--lora-r", type=positive_int, help=f"rank of these matrices {r}")
    add("--lora-alpha", type=non_negative_float, help=f"their product is multiplied by alpha / r {alpha}")
    add("--lora-dropout", type=non_negative_float, help=f"share of their inputs that is dropped in training {dropout}")
    target = f"names of layers, or all-linear for every linear layer but the output layer {layers}"
    add("--lora-target-modules", nargs="+", metavar="NAME", help=target)
    by_default = " (the default here)" if defaults.get("bits") == 4 else ""
    add_bits(memory, f"hold the frozen weights in 4 bit, with --use-lora{by_default}")

    add = parser.add_argument_group("logging").add_argument
    add("--log-interval", type=positive_int, help="steps from one log line to the next")
    add("--eval-step", type=non_negative_int, default=0, help="steps between held-out losses; 0: before and after only")
    add("--eval-rows", type=non_negative_int, default=256, help="held-out rows to use at most; 0: none")
    curves = (
        "report the log as curves too: to files in the save directory (tensorboard), or to https://wandb.ai (wandb)"
    )
    add("--report-to", type=reporter, metavar="tensorboard|wandb", help=curves)

    checkpoints = parser.add_argument_group("a training that is cut goes on by the same command, from its checkpoint")
    add = checkpoints.add_argument
    add("--save-steps", type=non_negative_int, default=0, help="steps between checkpoints; 0: about every 30 minutes")
    add("--save-total-limit", type=positive_int, default=1, help="checkpoints to keep, beside the one being written")
    add("--restart", action="store_true", help="begin anew, though a training was cut here")
    add_switch(
        checkpoints, "keep-best", False, "save the weights of the lowest held-out loss of --eval-step, not the last"
    )
    add("--skip-nonfinite", type=non_negative_int, default=0, help="steps without a finite loss that may be left out")

    bits = defaults.pop("bits", 0)
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    base = base_of(args.model_name_or_path)
    of_lora = {**DEFAULTS, "bits": bits} if base == args.model_name_or_path else of_adapter(args)
    for name, value in of_lora.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.gradient_checkpointing = SWITCH[args.gradient_checkpointing]
    if args.bits and not args.use_lora:
        parser.error(
            f"--load-in-{args.bits}bit without --use-lora: weights in {args.bits} bit can't be trained, only used. "
            "Add --use-lora, or --no-quantization to train all weights"
        )
    if args.keep_best and not (args.eval_step and args.eval_rows):
        parser.error("--keep-best needs held-out losses to compare: give --eval-step, and --eval-rows above 0")
    if args.batch_size < world_size():
        parser.error(
            f"--batch-size {args.batch_size} has fewer rows than the {world_size()} processes: "
            f"give --batch-size {world_size()} or more, or start fewer processes"
        )
    if args.lora_dropout >= 1:
        parser.error(f"--lora-dropout {args.lora_dropout} drops everything: it must be less than 1")
    if args.lr is None:
        args.lr = lora_lr if args.use_lora else lr
    args.max_train_steps = args.max_train_steps or (0 if args.epochs else steps)
    args.epochs = args.epochs or epochs
    require_writable(Path(args.save_dir), "--save-dir")  # now, and not after hours of training
    for model in (args.model_name_or_path, base):
        if Path(args.save_dir).resolve() == Path(model).resolve():
            raise UserError(f"--save-dir {args.save_dir} is the model directory, which would be lost. Give another.")
    return args


def inference_arguments(description: str, model_name_or_path: str, chat: bool = False) -> argparse.Namespace:
    """Options of `inference_*`: model_name_or_path, prompt, prompt_file, save_path, batch_rows, max_new_tokens,
    temperature, seed, bits; of a chat, system.

    `prompt` is the reader's text, of --prompt or of --prompt-file, or None: the script then takes its own sample. With
    `save_path` the file holds many, which dataset.questions reads. `bits` is None unless given: a model as it is
    stored, the base of an adapter as it was in the training.
    """
    parser = Parser(description)
    add = parser.add_argument
    add("--model-name-or-path", default=model_name_or_path, help="directory of the trained model or adapter")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="your own text, put into the format of the training")
    text.add_argument("--prompt-file", help="a file with your own text; with --save-path a .jsonl file of many")
    add("--save-path", metavar="ANSWERS.jsonl", help="answer each row of --prompt-file, and save the answers here")
    add(
        "--batch-rows", type=positive_int, default=8, help="rows of --prompt-file asked at once, fewer need less memory"
    )
    if chat:
        add("--system", help="a text before the conversation that says how to answer")
    add("--max-new-tokens", type=positive_int, default=256, help="tokens of the answer at most")
    add(
        "--temperature",
        type=non_negative_float,
        default=0.0,
        help="0: always the likeliest token (greedy); above: sampled",
    )
    add("--seed", type=int, default=0, help="for sampling")
    add_bits(parser, "load the model, or the adapter's base, in 4 bit")
    args = parser.parse_args()
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty: give it a text, or leave it out for the script's own sample")
    if args.save_path and not args.prompt_file:
        parser.error(f"--save-path {args.save_path} is for the answers to a file of prompts: give --prompt-file")
    if args.prompt_file and not args.save_path:
        if Path(args.prompt_file).suffix.lower() == ".jsonl":
            parser.error(f"--prompt-file {args.prompt_file} holds a prompt a line: give --save-path for their answers")
        args.prompt = _text_of_file(args.prompt_file, parser)
    return args


def _text_of_file(path: str, parser: Parser) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read().strip()
        if "\0" in text:
            raise ValueError("it holds zero bytes, as UTF-16 does")
    except (OSError, ValueError) as error:
        parser.error(f"--prompt-file {path} can't be read, save it as UTF-8 text: {error}")
    if not text:
        parser.error(f"--prompt-file {path} is empty: give a file with a text")
    return text


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
