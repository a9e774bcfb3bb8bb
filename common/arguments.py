"""The options that the scripts share. A script gives its defaults; the spellings of older pages go on working."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from common import UserError, nearest_existing
from common.download import base_of


def _parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it is written, and each option's default where it has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def _at_least(least, kind):
    """An argparse type: a number of `kind` that is `least` or more, one clear line otherwise."""

    def parse(text: str):
        value = kind(text)
        if not least <= value < math.inf:  # NaN fails as well
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {least} or more, and finite")
        return value

    parse.__name__ = kind.__name__
    return parse


def _require_directory(directory: Path, option: str) -> None:
    """UserError where `directory` is not there and can't be made, or nothing may be written in it."""
    existing = nearest_existing(directory)
    if not existing.is_dir():
        raise UserError(f"{existing} is a file, so nothing can be saved in {directory}. Give another {option}.")
    if not os.access(existing, os.W_OK):
        raise UserError(f"Nothing may be written in {existing}. Give another {option}.")


_COUNT, _COUNT_OR_NONE = _at_least(1, int), _at_least(0, int)
_NUMBER = _at_least(0, float)


def _add_switch(parser, name: str, default: bool, help: str) -> None:
    """`--name` and `--no-name`, as argparse has them itself since Python 3.9."""
    parser.add_argument(f"--{name}", action="store_true", default=default, help=f"{help}; --no-{name} turns it off")
    dest = name.replace("-", "_")
    parser.add_argument(f"--no-{name}", dest=dest, action="store_false", help=argparse.SUPPRESS)


def _add_bits(parser, default, help: str) -> None:
    """`args.bits`: 4 or 8, 0 for a model as it is stored, or the script's default."""
    parser.set_defaults(bits=default)
    group = parser.add_mutually_exclusive_group()

    def add(name, const, help):
        group.add_argument(name, dest="bits", action="store_const", const=const, default=argparse.SUPPRESS, help=help)

    add("--load-in-4bit", 4, help + (" (the default here)" if default == 4 else ""))
    add("--load-in-8bit", 8, "the same in 8 bit")
    add("--no-quantization", 0, "neither of the two")


def download_arguments(description: str, model_name: str, save_dir: str) -> argparse.Namespace:
    """Options of `download_*`: model_name, save_dir, token, tiny."""
    parser = _parser(description)
    parser.add_argument("--model-name", default=model_name, help="the model's id on the hub")
    parser.add_argument("--save-dir", default=save_dir, help="directory for the model and its tokenizer")
    parser.add_argument("--token", help="your Hugging Face token, for a gated model (else: login cache, HF_TOKEN)")
    parser.add_argument("--tiny", action="store_true", help="write a small stand-in with random weights, to rehearse")
    return parser.parse_args()


def prepare_arguments(
    description: str, model_name_or_path: str, dataset_name_or_path: str, block_size: int, save_path: str
) -> argparse.Namespace:
    """Options of `prepare_*`: model_name_or_path, dataset_name_or_path, block_size, save_path."""
    parser = _parser(description)
    parser.add_argument("--model-name-or-path", default=model_name_or_path, help="directory with the tokenizer")
    parser.add_argument(
        "--dataset-name-or-path",
        default=dataset_name_or_path,
        help="hub id, .jsonl/.json/.csv/.parquet file, or folder with train and validation files",
    )
    parser.add_argument("--block-size", type=_COUNT, default=block_size, help="tokens of a row at most")
    parser.add_argument("--save-path", default=save_path, help="the dataset file to write")
    args = parser.parse_args()
    path = Path(args.save_path)
    if path.is_dir():
        raise UserError(f"{path} is a directory, so no dataset file can have that name. Give another --save-path.")
    _require_directory(path.parent, "--save-path")
    return args


def train_arguments(
    description: str,
    model_name_or_path: str,
    dataset_name_or_path: str,
    save_dir: str,
    batch_size: int,
    lr: float,
    log_interval: int,
    block_size: int = 1024,
    epochs: int = 1,
    max_train_steps: int = 0,
    lr_scheduler: str = "constant",
    warmup_steps: int = 0,
    seed: int = 0,
    use_lora: bool = False,
    lora_lr: float = 2e-4,
    bits: int = 0,
    gradient_checkpointing: bool = False,
) -> argparse.Namespace:
    """Options of `train_*`, named as the parameters; a script gives what differs from one tutorial to the next.

    bits: 4 or 8 where the base is quantized (--load-in-4bit, --load-in-8bit), which needs LoRA; else 0.
    """
    parser = _parser(description)
    add = parser.add_argument
    add("--model-name-or-path", default=model_name_or_path, help="directory of the model to fine-tune")
    add("--dataset-name-or-path", default=dataset_name_or_path, help="dataset file written by prepare_*")
    add(
        "--save-dir",
        "--save-model-dir",
        "--save-path",
        "--model-save-path",
        dest="save_dir",
        default=save_dir,
        help="directory for the trained model, its log and its loss picture",
    )
    # where a tutorial's length is a number of steps, --epochs alone must still be able to change it
    add("--epochs", type=_COUNT, help=f"times to go through the data (default: {epochs})")
    steps = max_train_steps or "by the epochs"
    add("--max-train-steps", type=_COUNT, help=f"optimizer steps, in place of epochs (default: {steps})")
    add("--batch-size", type=_COUNT, default=batch_size, help="rows of an optimizer step")
    add(
        "--micro-batch-tokens",
        type=_COUNT_OR_NONE,
        default=0,
        help="tokens on the device at once, less needs less memory; 0: 4096, on a CPU 1024",
    )
    add("--block-size", type=_COUNT, default=block_size, help="tokens of a row at most")
    # matrices that start at zero need far larger steps than weights that are nearly right
    add("--lr", type=_NUMBER, help=f"learning rate (default: {lr}, with --use-lora {lora_lr})")
    add("--lr-scheduler", choices=["constant", "linear", "cosine"], default=lr_scheduler, help="after the warm-up")
    add("--warmup-steps", type=_COUNT_OR_NONE, default=warmup_steps, help="steps in which the learning rate rises")
    add("--weight-decay", type=_NUMBER, default=0.01, help="of matrices; norms and biases have none")
    add("--max-grad-norm", type=_NUMBER, default=1.0, help="gradients are clipped to this norm; 0: not clipped")
    add("--train-on-prompt", action="store_true", help="loss on the prompt as well as on the answer")
    add("--log-interval", type=_COUNT, default=log_interval, help="steps from one log line to the next")
    add(
        "--eval-step",
        type=_COUNT_OR_NONE,
        default=0,
        help="steps from one held-out loss to the next; 0: before and after only",
    )
    add("--eval-rows", type=_COUNT_OR_NONE, default=256, help="held-out rows to use at most; 0: none")
    add("--seed", type=int, default=seed, help="same seed, same machine: same result")
    _add_switch(parser, "use-lora", use_lora, "train small matrices beside the frozen weights, and save them alone")
    add("--lora-r", type=_COUNT, default=16, help="rank of those matrices")
    add("--lora-alpha", type=_NUMBER, default=16, help="their product is scaled by alpha / r")
    add("--lora-dropout", type=_NUMBER, default=0.0, help="share of their input that is dropped in training")
    modules = "names of the layers that get them, or all-linear"
    add("--lora-target-modules", nargs="+", default=["all-linear"], metavar="NAME", help=modules)
    _add_bits(parser, bits, "freeze the base in 4 bit (NF4), for --use-lora only")
    checkpointing = "compute activations again in the backward pass: less memory, slower"
    _add_switch(parser, "gradient-checkpointing", gradient_checkpointing, checkpointing)
    args = parser.parse_args()
    if args.bits and not args.use_lora:
        parser.error(
            f"--load-in-{args.bits}bit without --use-lora: weights in {args.bits} bit can't be trained, only used. "
            "Add --use-lora, or --no-quantization to train all weights"
        )
    if args.lora_dropout >= 1:
        parser.error(f"--lora-dropout {args.lora_dropout} drops everything: it must be less than 1")
    if args.lr is None:
        args.lr = lora_lr if args.use_lora else lr
    if not args.max_train_steps:
        args.max_train_steps = 0 if args.epochs else max_train_steps
    args.epochs = args.epochs or epochs
    _require_directory(Path(args.save_dir), "--save-dir")  # now, and not after hours of training
    if Path(args.save_dir).resolve() == Path(args.model_name_or_path).resolve():
        raise UserError(f"--save-dir {args.save_dir} is the model directory, which would be lost. Give another.")
    return args


def merge_arguments(description: str, model_name_or_path: str, save_dir: str) -> argparse.Namespace:
    """Options of `merge_adapter`: model_name_or_path, save_dir."""
    parser = _parser(description)
    parser.add_argument("--model-name-or-path", default=model_name_or_path, help="directory of the adapter")
    parser.add_argument("--save-dir", default=save_dir, help="directory for the whole model")
    args = parser.parse_args()
    base = base_of(args.model_name_or_path)
    _require_directory(Path(args.save_dir), "--save-dir")
    if Path(args.save_dir).resolve() in (Path(args.model_name_or_path).resolve(), Path(base).resolve()):
        raise UserError(f"--save-dir {args.save_dir} is the directory of the adapter or of its base. Give another.")
    return args


def compare_arguments(description: str, model_name_or_path: str, dataset_name_or_path: str) -> argparse.Namespace:
    """Options of `compare_adapter`: model_name_or_path, dataset_name_or_path, rows, max_new_tokens, bits."""
    parser = _parser(description)
    add = parser.add_argument
    add("--model-name-or-path", default=model_name_or_path, help="directory of the adapter")
    add("--dataset-name-or-path", default=dataset_name_or_path, help="dataset file with the held-out rows")
    add("--rows", type=_COUNT, default=3, help="held-out rows whose questions are asked")
    add("--max-new-tokens", type=_COUNT, default=64, help="tokens of an answer at most")
    _add_bits(parser, None, "load the base in 4 bit")
    return parser.parse_args()


def evaluate_arguments(description: str, model_name_or_path: str) -> argparse.Namespace:
    """Options of `evaluate`: model_name_or_path, save_dir, rows, batch_rows, max_new_tokens, bits; and, None unless
    given, base_model_name_or_path and dataset_name_or_path."""
    parser = _parser(description)
    add = parser.add_argument
    add("--model-name-or-path", default=model_name_or_path, help="directory of the trained model or adapter")
    add("--base-model-name-or-path", help="the model before the training (default: as run.json beside the model says)")
    add("--dataset-name-or-path", help="dataset file with the held-out rows (default: as run.json says)")
    add("--save-dir", help="directory for evaluation.json and evaluation.png (default: that of the model)")
    add("--rows", type=_COUNT, default=64, help="held-out rows to use at most")
    add("--batch-rows", type=_COUNT, default=8, help="questions asked at once, fewer need less memory")
    add("--max-new-tokens", type=_COUNT, default=256, help="tokens of an answer at most")
    _add_bits(parser, None, "load the models, or the adapter's base, in 4 bit")
    args = parser.parse_args()
    if not args.save_dir:
        args.save_dir = args.model_name_or_path if Path(args.model_name_or_path).is_dir() else "."
    _require_directory(Path(args.save_dir), "--save-dir")
    return args


def inference_arguments(description: str, model_name_or_path: str) -> argparse.Namespace:
    """Options of `inference_*`: model_name_or_path, prompt, max_new_tokens, temperature, seed, bits.

    `prompt` is the reader's text, of --prompt or of --prompt-file, or None: the script then takes its own sample.
    `bits` is None unless given: a model as it is stored, the base of an adapter as it was in the training.
    """
    parser = _parser(description)
    add = parser.add_argument
    add("--model-name-or-path", default=model_name_or_path, help="directory of the trained model or adapter")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="your own text, put into the format of the training")
    text.add_argument("--prompt-file", help="a file with your own text")
    add("--max-new-tokens", type=_COUNT, default=256, help="tokens of the answer at most")
    add("--temperature", type=_NUMBER, default=0.0, help="0: always the likeliest token (greedy); above: sampled")
    add("--seed", type=int, default=0, help="for sampling")
    _add_bits(parser, None, "load the model, or the adapter's base, in 4 bit")
    args = parser.parse_args()
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty: give it a text, or leave it out for the script's own sample")
    if args.prompt_file:
        try:
            with open(args.prompt_file, encoding="utf-8") as file:
                args.prompt = file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--prompt-file {args.prompt_file} can't be read as UTF-8 text: {error}")
        if not args.prompt:
            parser.error(f"--prompt-file {args.prompt_file} is empty: give a file with a text")
    return args
