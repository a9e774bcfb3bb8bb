"""The options of LoRA, and the base's bits: the defaults, and those of an adapter that is trained further.

None of this imports torch, so that a contradiction is answered at once.
"""

from __future__ import annotations

import json
from pathlib import Path

from common import UserError
from common.model_directory import adapter_facts, run_of

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
