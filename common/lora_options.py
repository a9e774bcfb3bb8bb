"""The options of LoRA, and the base's bits: as they are given, of an adapter that is trained further, or the defaults.

None of this imports torch, so that a contradiction is answered at once.
"""

from __future__ import annotations

import json
from pathlib import Path

from common import UserError
from common.model_directory import adapter_facts, base_of, run_of

DEFAULTS = {"lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}
FIXED = ("lora_r", "lora_alpha", "lora_target_modules")  # of matrices that are there


def settle_lora(args, bits: int) -> None:
    """Give those of the options that are None in `args` a value; `bits`: the script's own default.

    An adapter's matrices have their r, their alpha and their places. Its base is held in the bits in which it was, and
    the dropout is as it was, where nothing else is asked for. UserError where the options ask for other matrices, or
    for a training of all weights, of which an adapter has none.
    """
    directory = args.model_name_or_path
    adapter, values = base_of(directory) != directory, {**DEFAULTS, "bits": bits}
    if adapter and not args.use_lora:
        raise UserError(
            f"{directory} is an adapter. --use-lora trains it further; to train all weights, make one model of it and "
            f"its base first: python tutorial/merge_adapter.py --model-name-or-path {directory}"
        )
    if adapter:
        values = _of_adapter(directory)
    for name, value in values.items():
        given = getattr(args, name)
        if given is None:
            setattr(args, name, value)
        elif adapter and name in FIXED and not _same(given, value, directory):
            told = [" ".join(map(str, some)) if isinstance(some, list) else some for some in (given, value)]
            raise UserError(
                f"--{name.replace('_', '-')} {told[0]}: the adapter {directory}, which is trained further, has "
                f"{told[1]}. Leave the option out, or train a new adapter on its base."
            )


def _of_adapter(directory: str) -> dict:
    config = _config(directory)
    if config.get("peft_type") != "LORA":
        raise UserError(f"The adapter {directory} is of the kind {config.get('peft_type')}: only LoRA is trained here.")
    trained = run_of(directory).get("options", {})
    values = {
        "lora_r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "lora_target_modules": trained.get("lora_target_modules") or _names(directory),
        "bits": int(adapter_facts(directory).get("base_bits", 0)),
    }
    if not all(isinstance(values[name], (int, float)) for name in ("lora_r", "lora_alpha", "lora_dropout")):
        raise UserError(f"{directory}/adapter_config.json is damaged: train the adapter again")
    return values


def _same(given, value, directory: str) -> bool:
    if not isinstance(given, list):
        return given == value
    return sorted(given) in (sorted(value), _names(directory))


def _names(directory: str) -> list:
    """Of the layers that have matrices. By an expression, or with experts, all-linear has made them."""
    names = _config(directory).get("target_modules")
    named = isinstance(names, list) and not _config(directory).get("target_parameters")
    return sorted(names) if named else DEFAULTS["lora_target_modules"]


def _config(directory: str) -> dict:
    return json.loads((Path(directory) / "adapter_config.json").read_text("utf-8"))  # base_of has found it whole
