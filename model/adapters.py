"""LoRA adapters, and frozen bases in 4 or 8 bit: peft and bitsandbytes, asked for only where a reader asks for them.

LoRA (https://arxiv.org/abs/2106.09685): a layer's weights W stay as they are, and alpha / r * B A is added to them. A
[r, in] and B [out, r] are trained; B starts at zero, so that the training starts from the base itself. Nothing of the
base needs a gradient or an optimizer state, so it may be held in 4 bit (QLoRA, https://arxiv.org/abs/2305.14314).
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import List, Optional

import torch
from torch import nn

from common import UserError, brought_by
from common.model_directory import ADAPTER, adapter_facts

LEAST_PEFT = (0, 13)  # keeps an adapter in float32 on a base in 16 bit
LEAST_BITSANDBYTES = {"cpu": (0, 46)}  # the first that quantizes there
LEAST_BITSANDBYTES_ELSEWHERE = (0, 43)


def quantization(bits: int, device: torch.device, dtype: torch.dtype) -> dict:
    """The options with which transformers loads a model in `bits` (4: NF4 and double quantization; 8: LLM.int8).

    A weight is turned back into `dtype` for each product. UserError without a bitsandbytes that can do it.
    """
    require_bitsandbytes(f"--load-in-{bits}bit", device)
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**{"load_in_8bit": True} if bits == 8 else {**four, "bnb_4bit_compute_dtype": dtype})
    return {"quantization_config": config, "device_map": device}


def require_bitsandbytes(what: str, device: torch.device) -> None:
    """UserError, which begins with `what`, without a bitsandbytes that works on `device`."""
    _require("bitsandbytes", LEAST_BITSANDBYTES.get(device.type, LEAST_BITSANDBYTES_ELSEWHERE), what)


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes (seen in 0.50) from packing 4-bit weights for a faster forward pass in evaluation on a CPU.

    Packed weights stay packed, and their products have no gradient: after a held-out loss the training would go on
    without what flows back through the base, and without an error.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def tell_what_is_not_in_bits(model: nn.Module, bits: int) -> None:
    """Print the share of a quantized model's weights that bitsandbytes left as they were: it takes linear layers alone,
    and the experts of MoE are none."""
    from model.targets import share_in_bits

    rest = 1 - share_in_bits(model)
    if rest > 0.01:
        print(f"{rest:.0%} of the weights between embeddings and output layer are not in {bits} bit: no linear layers")


def add_lora(model: nn.Module, base: str, r: int, alpha: float, dropout: float, target_modules: List[str]) -> nn.Module:
    """`model` of the directory `base`, frozen, with a new adapter on it: a peft model. Its own weights are float32.

    `target_modules`: names of layers, or ["all-linear"]. What model.targets has to say of them is printed, and so is
    the share of the weights that gets no adapter. UserError where the model has no such layers, or peft none for them.
    """
    _require("peft", LEAST_PEFT, "--use-lora")
    from peft import LoraConfig, get_peft_model

    from model.targets import adapted, choose_targets, matrices

    targets = choose_targets(model, base, target_modules, dropout)
    total = sum(matrices(model).values())
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets.modules,
        fan_in_fan_out=targets.transposed,
    )
    if targets.parameters:
        config.target_parameters = targets.parameters  # peft before 0.17 has no such argument
    try:
        with _without_warnings():
            model = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"peft puts no adapter beside these layers of {base}: {' '.join(str(error).split())[:200]} Name others "
            "with --lora-target-modules."
        ) from None
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    beside = adapted(model)
    names = sorted({name.split(".")[-1] for name in beside})
    print(f"LoRA: {trained:,} trainable parameters, r {r}, beside {', '.join(names)}")
    without = 1 - sum(beside.values()) / total
    if without > 0.0005:
        print(f"LoRA: {without:.1%} of the weights between embeddings and output layer have no adapter beside them")
    return model


def save_adapter(model: nn.Module, directory: Path, template: str) -> None:
    """The adapter of a peft model, and nothing of its base, as plain peft loads it.

    What peft doesn't ask for stands in the weight file's own metadata: the base's name, a fingerprint of its weights
    and the bits in which it was held, and the template of the prompts.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = model.peft_config["default"]
    config.inference_mode = True  # whoever loads it may ask at once
    config.save_pretrained(directory)
    config.inference_mode = False
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    facts = {
        "format": "pt",
        "base": config.base_model_name_or_path,
        "base_fingerprint": _fingerprint(config.base_model_name_or_path),
        "base_bits": str(_bits(model)),
        "template": template,
    }
    weights = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    save_file(weights, directory / ADAPTER, metadata=facts)


def load_adapter(model: nn.Module, adapter_dir: str) -> nn.Module:
    """`model` with the adapter of `adapter_dir` on it, to be asked or merged. UserError where it is of another base."""
    _require("peft", LEAST_PEFT, "an adapter")
    from peft import PeftModel

    base = model.name_or_path
    expected = adapter_facts(adapter_dir).get("base_fingerprint")
    if expected and expected != _fingerprint(base):
        raise UserError(
            f"The adapter {adapter_dir} was trained on other weights than those in {base}. Download that model again, "
            f"or write the right directory into base_model_name_or_path of {adapter_dir}/adapter_config.json."
        )
    try:
        with _without_warnings():
            return PeftModel.from_pretrained(model, adapter_dir)
    except Exception as error:  # a damaged file, layers of another model: each has a type of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"The adapter {adapter_dir} can't be put on {base}: {reason}. Train it again.") from None


@contextmanager
def _without_warnings():
    """Those not for the reader: peft asks transformers by an older name, and tells of what is set right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # for GPT-2's layers
        warnings.filterwarnings("error", "Found missing adapter keys")  # part of it would stay untrained, in silence
        yield


def _bits(model: nn.Module) -> int:
    if getattr(model, "is_loaded_in_8bit", False):
        return 8
    return 4 if getattr(model, "is_loaded_in_4bit", False) else 0


def _fingerprint(model_dir: str) -> str:
    """A hash of a little from everywhere in a model's weight files; 16 hex digits, of a hub id none at all."""
    digest = hashlib.sha256()
    files = sorted(Path(model_dir).glob("*.safetensors")) or sorted(Path(model_dir).glob("*.bin"))
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            for place in range(0, size, max(1, size // 1024)):
                file.seek(place)
                digest.update(file.read(64))
    return digest.hexdigest()[:16] if files else ""


def _require(package: str, least: tuple, what: str) -> None:
    """UserError unless `package` of version `least` or newer is there and can be imported."""
    from importlib import import_module
    from importlib.metadata import PackageNotFoundError, version

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at its import, peft's too, it offers a package
    problem: Optional[str] = None
    try:
        have = version(package)
        if tuple(map(int, have.split(".")[:2])) < least:
            problem = f"{have} is installed"
        else:
            import_module(package)
    except PackageNotFoundError:
        problem = "it is not installed"
    except Exception as error:  # made for another torch, it fails in ways of its own
        problem = f"{have} does not work with torch {torch.__version__} ({type(error).__name__})"
    if problem:
        number = ".".join(map(str, least))
        raise UserError(
            f"{what} needs {package} {number} or newer, and {problem}: pip install -r {brought_by(package)}"
        )
