"""LoRA adapters by peft, on a base model that bitsandbytes can hold in 4 or 8 bit.

LoRA (https://arxiv.org/abs/2106.09685) leaves a layer's weights W as they are and adds alpha / r * B A to them. A
[r, in] and B [out, r] are trained; B starts at zero, so the training starts from the base model itself. The base model
needs no gradients and no optimizer states, so it can be held in 4 bit (QLoRA, https://arxiv.org/abs/2305.14314).

peft and bitsandbytes are imported only where they are needed: full fine-tuning works without them.
"""

from __future__ import annotations

import json
import re
import warnings
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from common.support.compat import require_package
from common.support.exit import UserError, short_message
from common.support.files import weights_fingerprint
from common.support.model_dir import ADAPTER, ModelSource
from model.probe import largest_difference, logits_of, probe_ids

LEAST_PEFT = (0, 13)  # the first that keeps an adapter in float32 on a base model in 16 bit
KEYS_OF_PEFT_0_13 = (
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "r",
    "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config",
    "megatron_core", "loftq_config", "use_dora", "layer_replication",
)  # fmt: skip


def require_peft(what: str = "--use-lora") -> None:
    """UserError, which begins with `what`, without a peft that works here."""
    require_package("peft", LEAST_PEFT, what)


# ------------------------------------------------------------------------------------------------ a new adapter


def add_lora(model: nn.Module, base: str, r: int, alpha: float, dropout: float, target_modules: List[str]) -> nn.Module:
    """`model` of the directory `base`, frozen, with a new adapter on it: a peft model. The adapter is in float32.

    target_modules: names of layers, or ["all-linear"], see all_linear. What is trained is printed. Raises UserError if
    the model has no such layers, or peft no adapter for them.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    layers = dict(linear_layers(model))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # GPT-2 and Cerebras-GPT keep their matrices transposed.
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    if target_modules == ["all-linear"]:
        target_all_linear(config, model, base)
    else:
        names = {module_suffix(name) for name in layers}
        unknown = [name for name in target_modules if name not in names]
        if unknown:
            raise UserError(
                f"--lora-target-modules {unknown[0]}: {base} has no layer of that name. "
                f"It has {', '.join(sorted(names))}; all-linear selects all of them."
            )
        config.target_modules = target_modules
    num_weights = sum(weight_matrices(model).values())
    try:
        with _without_warnings():
            model = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"peft has no adapter for these layers of {base}: {short_message(error)} Choose others with "
            "--lora-target-modules."
        ) from None
    print_trainable_parameters(model, r, num_weights)
    return model


def target_all_linear(config, model: nn.Module, base: str) -> None:
    """Set the targets of peft's LoraConfig: every matrix product of the model but its output layer.

    These are linear layers, and the experts of a mixture of experts (MoE), which transformers 5 holds as one tensor
    [experts, out, in] a layer. Of a model that also reads images, the language model alone. Routers, and layers that
    peft refuses, are left out. All of this is printed. Raises UserError for dropout on experts, which peft lacks.
    """
    modules = [name for name, _ in model.named_modules()]
    language_model = next((name for name in modules if name.endswith(("language_model", "text_model"))), "")
    layers = {name: layer for name, layer in linear_layers(model) if name.startswith(language_model)}
    refused = {module_suffix(name) for name, layer in layers.items() if not _supports_adapter(model, name, layer)}
    names = sorted({module_suffix(name) for name in layers} - refused)
    if refused:
        print(f"LoRA: no adapter on {', '.join(sorted(refused))}, which peft does not support.")
    experts = sorted({".".join(name.split(".")[-2:]) for name, _ in expert_tensors(model)})
    if experts and "target_parameters" not in signature(type(config)).parameters:
        print("LoRA: no adapter on the experts, which need peft 0.17 or newer. Run: pip install -U peft")
        experts = []
    if experts and config.lora_dropout:
        raise UserError(
            f"--lora-dropout {config.lora_dropout}: {base} is a mixture of experts, and peft has no dropout on them. "
            "Give --lora-dropout 0, or choose other layers with --lora-target-modules."
        )
    if experts and all(layer.weight.is_floating_point() for layer in layers.values()):
        # peft takes layers of these names for experts, and would leave out dense layers and shared experts. Their
        # weights are targets too, unless they are quantized.
        mistaken = [name for name in names if name in ("gate_proj", "up_proj", "down_proj")]
        names = [name for name in names if name not in mistaken]
        experts += [f"{name}.weight" for name in mistaken]
    config.target_modules = names
    if language_model:
        print(f"LoRA: on the language model alone ({language_model}); the parts for images or sound stay unchanged.")
        config.target_modules = rf"{re.escape(language_model)}\.(.*\.)?({'|'.join(map(re.escape, names))})"
    if experts:
        config.target_parameters = experts


def _supports_adapter(model: nn.Module, name: str, layer: nn.Module) -> bool:
    """False for routers, whose weights are used without a call or give several outputs, and for what peft refuses."""
    if "Router" in type(layer).__name__ or "router" in name.split("."):
        return False
    try:  # since peft 0.18
        from peft import LoraConfig
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

        _check_lora_target_modules_mamba(LoraConfig(), model, module_suffix(name))
    except ImportError:
        pass
    except ValueError:
        return False
    return True


def check_gradients_of_first_step(model: nn.Module) -> None:
    """Let a peft model raise UserError, at its second forward pass in training, if an adapter had no gradient before.

    Some models use a layer's weight without calling the layer (Mamba's dt_proj). Its adapter would learn nothing. An
    expert that got no token is not meant: the module that the layer belongs to must have run.
    """
    adapted = {}
    ran: Set[str] = set()
    with_gradient: Set[str] = set()
    hooks = []

    def after_parent(name: str, *_) -> None:
        if torch.is_grad_enabled():
            ran.add(name)

    def after_gradient(name: str, _) -> None:
        with_gradient.add(name)

    def before_model(*_) -> None:
        if not torch.is_grad_enabled() or not with_gradient:
            return
        for hook in hooks:
            hook.remove()
        without = sorted({module_suffix(name) for name in ran - with_gradient})
        if without:
            others = sorted({module_suffix(name) for name in adapted} - set(without))
            raise UserError(
                f"The adapter on {', '.join(without)} got no gradient: {model.config.model_type} uses the weight of "
                f"that layer without calling the layer. Leave it out: --lora-target-modules {' '.join(others)}"
            )

    for name, layer in model.named_modules():
        if len(getattr(layer, "lora_B", ())) and not hasattr(layer, "parameter_name"):  # not the tensors of experts
            adapted[name] = layer
    for name, layer in adapted.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        hooks.append(parent.register_forward_hook(partial(after_parent, name)))
        hooks.append(layer.lora_B["default"].weight.register_hook(partial(after_gradient, name)))
    hooks.append(model.get_base_model().register_forward_pre_hook(before_model))


def print_trainable_parameters(model: nn.Module, r: int, num_weights: int) -> None:
    """Print what is trained of a peft model, and which share of the `num_weights` of its layers has no adapter."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    matrices = adapted_matrices(model)
    names = sorted({name.split(".")[-1] for name in matrices})
    print(f"LoRA: {trained:,} trainable parameters, r={r}, on {', '.join(names)}")
    without = 1 - sum(matrices.values()) / num_weights
    if without > 0.0005:
        print(f"LoRA: {without:.1%} of the layer weights have no adapter")


# ------------------------------------------------------------------------------------------------ layers and weights


def linear_layers(model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """(name, layer) of every linear layer but the output layer, quantized ones too."""
    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head:
            yield name, layer


def expert_tensors(model: nn.Module) -> Iterator[Tuple[str, nn.Parameter]]:
    """(name, parameter) of every tensor that holds all experts of a layer."""
    for name, parameter in model.named_parameters():
        if "expert" in name and parameter.dim() == 3:
            yield name, parameter


def weight_matrices(model: nn.Module) -> Dict[str, int]:
    """{name of a module or parameter: number of weights} of all matrices between embeddings and output layer."""
    sizes = {name: num_weights_of(layer) for name, layer in linear_layers(model)}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            for parameter_name, parameter in module.named_parameters(prefix=name, recurse=False):
                if parameter.dim() > 1:
                    sizes[parameter_name] = parameter.numel()
    return sizes


def adapted_matrices(model: nn.Module) -> Dict[str, int]:
    """The same of the layers and experts of a peft model that have an adapter."""
    sizes = {}
    for name, layer in model.named_modules():
        if len(getattr(layer, "lora_A", ())) and hasattr(layer, "get_base_layer"):
            parameter_name = getattr(layer, "parameter_name", None)  # of experts
            if parameter_name:
                sizes[f"{name}.{parameter_name}"] = getattr(layer.get_base_layer(), parameter_name).numel()
            else:
                sizes[name] = num_weights_of(layer.get_base_layer())
    return sizes


def num_weights_of(layer: nn.Module) -> int:
    """The number of weights of a linear layer; the tensor of a layer in 4 bit has fewer elements."""
    return layer.weight.numel() if isinstance(layer, Conv1D) else layer.in_features * layer.out_features


def module_suffix(name: str) -> str:
    """The end of a layer's name that similar layers have in common: `q_proj`, or `in_proj.0` in a list."""
    return re.search(r"[^.]*(\.\d+)*$", name).group()


# ------------------------------------------------------------------------------------------------ save and load


def save_adapter(model: nn.Module, directory: Path, template: str) -> None:
    """Save the adapter of a peft model, without its base model, so that plain peft loads it.

    The metadata of the weight file says what peft does not ask for: the base model, a fingerprint of its weights, the
    bits in which it was loaded, and the prompt template.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = model.peft_config["default"]
    config.inference_mode = True  # or plain peft would load it to be trained
    config.save_pretrained(directory)
    config.inference_mode = False
    _remove_new_keys(directory / "adapter_config.json", config)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    facts = {
        "format": "pt",
        "base": config.base_model_name_or_path,
        "base_fingerprint": weights_fingerprint(config.base_model_name_or_path),
        "base_bits": str(bits_of(model)),
        "template": template,
    }
    save_file(weights, directory / ADAPTER, metadata=facts)


def _remove_new_keys(path: Path, config) -> None:
    """Remove keys that peft 0.13 does not know, where they have their default: it refuses unknown keys."""
    default = type(config)()
    kept = {}
    for key, value in json.loads(path.read_text(encoding="utf-8")).items():
        is_needed = hasattr(default, key) and value != getattr(default, key)
        if key in KEYS_OF_PEFT_0_13 or is_needed:
            kept[key] = sorted(value) if isinstance(value, list) else value
    path.write_text(json.dumps(kept, indent=2, sort_keys=True), encoding="utf-8")


def load_trainable_adapter(model: nn.Module, adapter_dir: str, dropout: float) -> nn.Module:
    """`model`, frozen, with the adapter of `adapter_dir` on it, which is to be trained further."""
    require_peft()
    from peft import PeftConfig

    num_weights = sum(weight_matrices(model).values())
    config = PeftConfig.from_pretrained(adapter_dir)
    config.lora_dropout = dropout
    model = load_adapter(model, adapter_dir, is_trainable=True, config=config)
    print(f"LoRA: continuing to train adapter {adapter_dir}")
    print_trainable_parameters(model, config.r, num_weights)
    return model


def load_adapter(model: nn.Module, adapter_dir: str, **options) -> nn.Module:
    """`model` with the adapter of `adapter_dir` on it. options: those of PeftModel.from_pretrained.

    Raises UserError if it is the adapter of another base model.
    """
    require_peft("an adapter")
    base = model.name_or_path
    expected = ModelSource(adapter_dir).adapter_facts.get("base_fingerprint")
    if expected and expected != weights_fingerprint(base):
        raise UserError(
            f"The adapter {adapter_dir} was trained on other weights than those in {base}. Download that model again, "
            f"or write the right directory into base_model_name_or_path of {adapter_dir}/adapter_config.json."
        )
    try:
        return open_adapter(model, adapter_dir, **options)
    except Exception as error:  # a damaged file, or layers of another model: each has an exception of its own
        raise UserError(
            f"The adapter {adapter_dir} can't be loaded on {base}: {short_message(error)}. Train it again."
        ) from None


def open_adapter(model: nn.Module, adapter_dir: str, **options) -> nn.Module:
    """`model` with the adapter of `adapter_dir` on it, by plain peft. Raises if a part of it is missing."""
    from peft import PeftModel

    with _without_warnings():
        return PeftModel.from_pretrained(model, adapter_dir, **options)


def merge(model: nn.Module) -> nn.Module:
    """The plain model with the weights W + alpha / r * B A of a peft model.

    If the output layer shares its weights with the embeddings, and one of them has an adapter, each gets weights of its
    own. Raises UserError if the logits change by more than rounding, which is coarse in 16 bit.
    """
    network = model.get_base_model()
    expected = logits_of(model, probe_ids(network, 12))
    layers = [network.get_input_embeddings(), network.get_output_embeddings()]
    if any(hasattr(layer, "merge") for layer in layers) and layers[0].weight is layers[1].weight:
        head = getattr(layers[1], "base_layer", layers[1])
        head.weight = nn.Parameter(head.weight.detach().clone())
    with _without_warnings():
        merged = model.merge_and_unload()
    head = merged.get_output_embeddings()
    if head is not None and head.weight is not merged.get_input_embeddings().weight:
        for config in (merged.config, getattr(merged.config, "text_config", merged.config)):
            config.tie_word_embeddings = False
    difference = largest_difference(logits_of(merged, probe_ids(merged, 12)), expected)
    if not difference < (1e-3 if merged.dtype == torch.float32 else 0.1):
        raise UserError(
            f"The merged model is not the adapter's: its logits differ by {difference:.1%} of the largest one. Use the "
            "adapter without merging it, or train one on other layers."
        )
    return merged


@contextmanager
def _without_warnings():
    """Without those warnings of peft that users can do nothing about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # for GPT-2's layers
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")  # into a model without weights
        warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")  # which `merge` cares for
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        warnings.filterwarnings("error", "Found missing adapter keys")  # or a part would silently stay untrained
        yield


# ------------------------------------------------------------------------------------------------ 4 and 8 bit


def quantization_config(bits: int, device: torch.device, dtype: torch.dtype):
    """transformers' settings for a base model in 4 bit (NF4 with double quantization) or in 8 bit (LLM.int8).

    A weight is turned back into `dtype` for each product. Raises UserError without a bitsandbytes that works.
    """
    require_bitsandbytes(f"--load-in-{bits}bit", device)
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def require_bitsandbytes(what: str, device: torch.device) -> None:
    """UserError, which begins with `what`, without a bitsandbytes that works on `device`."""
    least = (0, 46) if device.type == "cpu" else (0, 43)  # 0.46 is the first that quantizes on a CPU
    require_package("bitsandbytes", least, what)


def disable_cpu_weight_packing(model: nn.Module) -> None:
    """Keep bitsandbytes (seen in 0.50) from packing 4 bit weights for a faster forward pass in evaluation on a CPU.

    Packed weights stay packed, and their products have no gradient: after a held-out loss, the training would continue
    without the gradients that flow through the base model, and without an error.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def print_unquantized_share(model: nn.Module, bits: int) -> None:
    """Print the share of a quantized model's layers that bitsandbytes left in 16 bit: experts are no linear layers."""
    quantized = 0
    for _, layer in linear_layers(model):
        if not layer.weight.is_floating_point():
            quantized += num_weights_of(layer)
    share = 1 - quantized / max(1, sum(weight_matrices(model).values()))
    if share > 0.01:
        print(f"{share:.0%} of the layer weights are not in {bits} bit, because they are not in linear layers.")


def bits_of(model: nn.Module) -> int:
    """4 or 8 of a model that bitsandbytes holds, else 0."""
    if getattr(model, "is_loaded_in_8bit", False):
        return 8
    return 4 if getattr(model, "is_loaded_in_4bit", False) else 0
