"""LoRA adapters: peft, asked for only where a reader asks for them.

LoRA (https://arxiv.org/abs/2106.09685): a layer's weights W stay as they are, and alpha / r * B A is added to them. A
[r, in] and B [out, r] are trained; B starts at zero, so that the training starts from the base itself. Nothing of the
base needs a gradient or an optimizer state, so it may be held in 4 bit (QLoRA, https://arxiv.org/abs/2305.14314).
"""

from __future__ import annotations

import json
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import List

from torch import nn

from common.support.compat import require_package
from common.support.exit import UserError, short_message
from common.support.files import weights_fingerprint
from common.support.model_dir import ADAPTER, ModelSource
from model.quantization import bits_of

LEAST_PEFT = (0, 13)  # keeps an adapter in float32 on a base in 16 bit
KEYS_OF_PEFT_0_13 = (
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "r",
    "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config",
    "megatron_core", "loftq_config", "use_dora", "layer_replication",
)  # fmt: skip


def require_peft() -> None:
    """UserError without a peft that works here."""
    require_package("peft", LEAST_PEFT, "--use-lora")


def add_lora(model: nn.Module, base: str, r: int, alpha: float, dropout: float, target_modules: List[str]) -> nn.Module:
    """`model` of the directory `base`, frozen, with a new adapter on it: a peft model. Its own weights are float32.

    `target_modules`: names of layers, or ["all-linear"]. What model.targets has to say of them is printed, and so is
    the share of the weights that gets no adapter. UserError where the model has no such layers, or peft none for them.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    from model.targets import choose_targets, matrices

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
            f"peft puts no adapter beside these layers of {base}: {short_message(error)} Name others with "
            "--lora-target-modules."
        ) from None
    _tell(model, r, total)
    return model


def _tell(model: nn.Module, r: int, total: int) -> None:
    """Print what is trained of a peft model, and which share of `total` weights of its base has nothing beside it."""
    from model.targets import adapted

    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    beside = adapted(model)
    names = sorted({name.split(".")[-1] for name in beside})
    print(f"LoRA: {trained:,} trainable parameters, r {r}, beside {', '.join(names)}")
    without = 1 - sum(beside.values()) / total
    if without > 0.0005:
        print(f"LoRA: {without:.1%} of the weights between embeddings and output layer have no adapter beside them")


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
    _without_new_keys(directory / "adapter_config.json", config)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    facts = {
        "format": "pt",
        "base": config.base_model_name_or_path,
        "base_fingerprint": weights_fingerprint(config.base_model_name_or_path),
        "base_bits": str(bits_of(model)),
        "template": template,
    }
    weights = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    save_file(weights, directory / ADAPTER, metadata=facts)


def _without_new_keys(path: Path, config) -> None:
    """Leave out what peft 0.13 does not know, where it is as if it were not there: it refuses unknown keys."""
    default = type(config)()
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {
        key: sorted(value) if isinstance(value, list) else value
        for key, value in content.items()
        if key in KEYS_OF_PEFT_0_13 or (hasattr(default, key) and value != getattr(default, key))
    }
    path.write_text(json.dumps(kept, indent=2, sort_keys=True), encoding="utf-8")


def go_on_with(model: nn.Module, adapter_dir: str, dropout: float) -> nn.Module:
    """As add_lora, with the matrices of the adapter of `adapter_dir` as they are, to be trained further."""
    require_peft()
    from peft import PeftConfig

    from model.targets import matrices

    total = sum(matrices(model).values())
    config = PeftConfig.from_pretrained(adapter_dir)
    config.lora_dropout = dropout
    model = load_adapter(model, adapter_dir, is_trainable=True, config=config)
    print(f"LoRA: the adapter {adapter_dir} is trained further")
    _tell(model, config.r, total)
    return model


def load_adapter(model: nn.Module, adapter_dir: str, **options) -> nn.Module:
    """`model` with the adapter of `adapter_dir` on it, to be asked or merged; `options`: peft's. UserError where it is
    of another base."""
    require_package("peft", LEAST_PEFT, "an adapter")
    from peft import PeftModel

    base = model.name_or_path
    expected = ModelSource(adapter_dir).adapter_facts.get("base_fingerprint")
    if expected and expected != weights_fingerprint(base):
        raise UserError(
            f"The adapter {adapter_dir} was trained on other weights than those in {base}. Download that model again, "
            f"or write the right directory into base_model_name_or_path of {adapter_dir}/adapter_config.json."
        )
    try:
        with _without_warnings():
            return PeftModel.from_pretrained(model, adapter_dir, **options)
    except Exception as error:  # a damaged file, layers of another model: each has a type of its own
        raise UserError(
            f"The adapter {adapter_dir} can't be put on {base}: {short_message(error)}. Train it again."
        ) from None


@contextmanager
def _without_warnings():
    """Those not for the reader: peft asks transformers by an older name, and tells of what is set right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # for GPT-2's layers
        warnings.filterwarnings("error", "Found missing adapter keys")  # part of it would stay untrained, in silence
        yield
