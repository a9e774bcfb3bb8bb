"""Beside which weights of a model an adapter is put, and which share of them gets none."""

from __future__ import annotations

import re
from inspect import getsource, signature
from typing import Dict, Iterator, List, NamedTuple, Tuple, Union

from torch import nn
from transformers.pytorch_utils import Conv1D

from common.support.exit import UserError


class Targets(NamedTuple):
    """What peft's LoraConfig is told."""

    modules: Union[List[str], str]  # names of layers, or one regular expression
    parameters: List[str]  # the experts of MoE, which are one tensor [experts, out, in] a layer in transformers 5
    transposed: bool  # GPT-2 and Cerebras-GPT keep their matrices transposed


def choose_targets(model: nn.Module, base: str, asked: List[str], dropout: float) -> Targets:
    """The layers `asked` for by name, or with ["all-linear"] every matrix product of `model` but its output layer.

    all-linear takes the experts of MoE too, where peft can; of a model that reads pictures too the language model
    alone; and leaves out layers for which peft has no adapter that works. It says so. UserError where `base` has no
    layer of a name; it lists those that it has; and with dropout on experts, which peft has not.
    """
    from peft import LoraConfig

    part = next((name for name, _ in model.named_modules() if name.endswith(("language_model", "text_model"))), "")
    layers = {name: layer for name, layer in _linear_layers(model) if name.startswith(part)}
    have = {_short(name) for name in layers}
    transposed = any(isinstance(layer, Conv1D) for layer in layers.values())
    if asked != ["all-linear"]:
        unknown = [name for name in asked if name not in have]
        if unknown:
            raise UserError(
                f"--lora-target-modules {unknown[0]}: {base} has no layer of that name. "
                f"It has {', '.join(sorted(have))}; all-linear takes all of them."
            )
        return Targets(asked, [], transposed)
    refused = {_short(name) for name, layer in layers.items() if not _can_have(model, name, layer)}
    names = sorted(have - refused)
    if refused:
        print(
            f"LoRA: no adapter beside {', '.join(sorted(refused))}: {model.config.model_type} does not call "
            "them as plain layers, or peft has none for them."
        )
    experts = sorted(
        {".".join(name.split(".")[-2:]) for name, weight in model.named_parameters() if _of_experts(name, weight)}
    )
    if experts and "target_parameters" not in signature(LoraConfig).parameters:
        print("LoRA: no adapter beside the experts, which peft has from 0.17 on: pip install -U peft")
        experts = []
    if experts and dropout:
        raise UserError(
            f"--lora-dropout {dropout}: {base} is a mixture of experts, and peft has no dropout on them. Give "
            "--lora-dropout 0, or name other layers with --lora-target-modules."
        )
    if experts:
        # peft takes layers of these names for experts of old, in the models where experts had them: dense layers and
        # shared experts would be left out. As tensors it takes them; not those in 4 bit.
        mistaken = [name for name in names if name in ("gate_proj", "up_proj", "down_proj")]
        if all(layer.weight.is_floating_point() for layer in layers.values()):
            names, experts = sorted(set(names) - set(mistaken)), experts + [f"{name}.weight" for name in mistaken]
    if part:
        print(f"LoRA: beside the language model alone ({part}); what reads pictures or sound stays as it is.")
        inside = "|".join(map(re.escape, names))
        return Targets(rf"{re.escape(part)}\.(.*\.)?({inside})", experts, transposed)
    return Targets(names, experts, transposed)


def matrices(model: nn.Module) -> Dict[str, int]:
    """{name of a module or tensor: how many weights} of all matrices between a model's embeddings and its output."""
    sizes = {
        # by its features, because a weight in 4 bit has fewer elements
        name: layer.weight.numel() if isinstance(layer, Conv1D) else _product(layer)
        for name, layer in _linear_layers(model)
    }
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            for own, weight in module.named_parameters(prefix=name, recurse=False):
                if weight.dim() > 1:
                    sizes[own] = weight.numel()
    return sizes


def share_in_bits(model: nn.Module) -> float:
    """The share of these weights that bitsandbytes holds in 4 or 8 bit: it takes linear layers, and no experts."""
    packed = sum(_product(layer) for _, layer in _linear_layers(model) if not layer.weight.is_floating_point())
    return packed / max(1, sum(matrices(model).values()))


def adapted(model: nn.Module) -> Dict[str, int]:
    """As `matrices`, of the layers and experts of a peft model that have an adapter beside them: peft may take others
    than it was told, of MoE models whose experts became one tensor."""
    sizes = {}
    for name, layer in model.named_modules():
        if len(getattr(layer, "lora_A", ())) and hasattr(layer, "get_base_layer"):
            of_experts = getattr(layer, "parameter_name", None)
            own = f"{name}.{of_experts}" if of_experts else name
            sizes[own] = getattr(layer.get_base_layer(), of_experts).numel() if of_experts else _product(layer)
    return sizes


def _product(layer) -> int:
    return layer.in_features * layer.out_features


def _linear_layers(model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """(name, layer) of every matrix product but the output layer, quantized ones too."""
    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head:
            yield name, layer


def _of_experts(name: str, weight: nn.Parameter) -> bool:
    """Whether this one tensor holds all experts of a layer."""
    return "expert" in name and weight.dim() == 3


def _short(name: str) -> str:
    """The end of a layer's name by which its likes in other places are known: `q_proj`, or `in_proj.0` in a list."""
    return re.search(r"[^.]*(\.\d+)*$", name).group()


def _can_have(model: nn.Module, name: str, layer: nn.Module) -> bool:
    """Whether an adapter beside the layer would be asked whenever the layer is.

    Mamba's code takes the weight of its dt_proj, and on a GPU that of its out_proj, by itself, past any adapter: that
    would learn nothing, and change the merged model. The routers of Llama 4 and Phi-MoE are layers with more than one
    answer. And peft has a list of its own.
    """
    if "Router" in type(layer).__name__:
        return False
    parent, _, own = name.rpartition(".")
    code = getsource(type(model.get_submodule(parent)))
    if re.search(rf"\bself\.{own}\.weight\b(?!\[|\.(data|dtype|device|shape|split)\b)", code):
        return False
    try:  # peft 0.18 or newer
        from peft import LoraConfig
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check

        check(LoraConfig(), model, own)
    except ImportError:
        pass
    except ValueError:
        return False
    return True
