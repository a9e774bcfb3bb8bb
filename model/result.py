"""What a result is: each tensor under its name and in its type of the base's files, compared once it is written; config
and tokenizer as plain transformers reads them, the releases before 5 included.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Dict, Optional

import torch
from safetensors import safe_open
from torch import nn

from common.support.exit import UserError
from common.support.model_dir import ModelSource
from common.tokenization import fingerprint, load_tokenizer
from model.stored import TYPES, Stored

CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
# what a tokenizer may consist of, each kind of some of these
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", *CHAT_TEMPLATES,
)  # fmt: skip


def weights_to_save(model: nn.Module, stored: Optional[Stored]) -> Dict[str, torch.Tensor]:
    """Copies of the weights on the CPU under the names of the files, each in its stored type; without `stored` as they
    are. Tied weights are one copy, so that they are saved once."""
    weights = model.state_dict()
    try:  # transformers 5 holds the experts of a layer as one tensor, the files each on its own
        from transformers.core_model_loading import revert_weight_conversion

        weights = revert_weight_conversion(model, weights)
    except ImportError:
        pass
    stored_type = (
        {_place(weights[name]): dtype for name, dtype in stored.types.items() if name in weights} if stored else {}
    )
    copies: dict = {}
    for name, weight in weights.items():
        place, dtype = _place(weight), weight.dtype
        if stored and weight.is_floating_point():
            dtype = stored_type.get(place) or stored.most or dtype
        weights[name] = copies.setdefault(place, weight.detach().to("cpu", dtype).contiguous())
    return weights


def check_saved(directory: Path, weights: Dict[str, torch.Tensor], model: nn.Module, stored: Optional[Stored]) -> None:
    """UserError unless the files in `directory` hold `weights`, by their headers, and one tensor in a hundred by value;
    as many numbers as the model has, and each in the type of the base's."""
    saved = ModelSource(directory).tensors
    places = {_place(weight) for name, weight in weights.items() if name in saved}
    lost = [name for name, weight in weights.items() if _place(weight) not in places]
    require(not lost, f"{lost[:1]} is missing")
    require(set(saved) <= set(weights), f"{sorted(set(saved) - set(weights))[:1]} is not a weight of it")
    for name, entry in saved.items():
        weight = weights[name]
        require(entry["shape"] == list(weight.shape), f"{name} has the shape {entry['shape']}")
        right = stored.types.get(name) if stored else None
        require(TYPES.get(entry["dtype"], weight.dtype) == (right or weight.dtype), f"{name} is in {entry['dtype']}")
    numbers = sum(weight.numel() for weight in {id(weight): weight for weight in weights.values()}.values())
    live = {_place(weight): weight.numel() for weight in model.state_dict().values()}
    require(numbers == sum(live.values()), f"it has {numbers} numbers in place of {sum(live.values())}")
    some = set(sorted(saved)[::100])
    for file in ModelSource(directory).safetensors_files:
        with safe_open(str(file), "pt") as opened:
            for name in some.intersection(opened.keys()):
                require(torch.equal(opened.get_tensor(name), weights[name]), f"{name} has other values")


def require(right: bool, what: str) -> None:
    """UserError, with `what` is wrong, unless what was written is `right`."""
    if not right:
        raise UserError(
            f"What was written is not the trained model: {what}. Nothing was replaced. Please report this, with the "
            "versions of torch, transformers and safetensors."
        )


def save_tokenizer(tokenizer, directory: Path, chat_template: Optional[str] = None) -> None:
    """The tokenizer's files as they came, where it is as it came; in words that transformers before 5 reads.

    chat_template: the one to have in place of the tokenizer's own, "": none, None: its own.
    """
    source = Path(tokenizer.name_or_path)
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if files and fingerprint(load_tokenizer(str(source))) == fingerprint(tokenizer):
        for file in files:
            shutil.copyfile(file, directory / file.name)
    else:
        tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    came = dict(settings)
    # what transformers 5 calls it, and takes for Mistral's by its config.json, which an adapter has not: by the class
    # of the hub's file it would be another one there, without the space between a special token and a text
    of_config = type(tokenizer).__name__ == "TokenizersBackend" and not (directory / "config.json").is_file()
    if of_config or settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if chat_template is not None:
        for other in CHAT_TEMPLATES:  # transformers takes them before the one in tokenizer_config.json
            (directory / other).unlink(missing_ok=True)
        shutil.rmtree(directory / "additional_chat_templates", ignore_errors=True)
        settings.pop("chat_template", None)
        settings.update({"chat_template": chat_template} if chat_template else {})
    if settings != came:
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def complete_config(directory: Path, base: str, dtype: Optional[torch.dtype]) -> None:
    """config.json with the old keys beside the new ones, as the base has them, or made of transformers 5's.

    A release before 5 passes over `rope_parameters`, and would compute with a rope_theta of 10000 without a word.
    """
    path = directory / "config.json"
    came, config = ModelSource(base).config if base else {}, json.loads(path.read_bytes())
    for key in ("quantization_config", "compression_config", "transformers_version", "auto_map", "_name_or_path"):
        came.pop(key, None)
    _older_keys(came, config)
    inner = came.get("text_config"), config.get("text_config")
    if all(isinstance(part, dict) for part in inner):
        _older_keys(*inner)
    if dtype:
        config["dtype"] = config["torch_dtype"] = str(dtype).replace("torch.", "")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _older_keys(came: dict, config: dict) -> None:
    config.update({key: value for key, value in came.items() if key not in config})
    rope = config.get("rope_parameters") or {}
    whole = rope.get("full_attention", rope)  # one for each kind of layer (Gemma 3), or one for all
    if isinstance(whole, dict) and "rope_theta" in whole:
        config.setdefault("rope_theta", whole["rope_theta"])
        kind = whole.get("rope_type", "default")
        if kind in ("linear", "dynamic"):  # releases before 4.43 take these two keys and no others
            config.setdefault("rope_scaling", {"type": kind, "factor": whole["factor"]})
        elif kind in ("yarn", "longrope", "llama3"):  # that they know
            config.setdefault("rope_scaling", {key: value for key, value in whole.items() if key != "rope_theta"})
    if "sliding_attention" in rope and "rope_theta" in rope["sliding_attention"]:
        config.setdefault("rope_local_base_freq", rope["sliding_attention"]["rope_theta"])


def _place(weight: torch.Tensor) -> tuple:
    """The same for two names of one tensor."""
    return weight.data_ptr(), weight.shape
