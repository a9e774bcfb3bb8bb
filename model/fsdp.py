"""A model that no process holds as a whole, by PyTorch's FSDP2.

Each process keeps a shard of every weight, of its gradient and of its optimizer states. Before a decoder layer runs,
its weights are gathered, in the type of the products; afterwards they are dropped again. Gradients are averaged over
all processes, and each keeps its shard of them. So a model is loaded and trained one layer at a time.

Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from common import distributed
from common.device import Device
from common.support.exit import UserError
from common.support.model_dir import ModelSource
from model.loss import CausalLMLoss
from model.weight_format import DTYPE, RECOMPUTED_BUFFERS, WeightFormat, explain_key_mismatch


def load_sharded(directory: str, weight_format: WeightFormat, dtype: torch.dtype, device: Device) -> CausalLMLoss:
    """The model of `directory` with its loss, in `dtype`; each process has a shard of each weight.

    Call only the forward of the loss, or require_causal: the layers gather their weights there. Raises UserError where
    the files do not hold the weights as the model does, so that no process can read its shard alone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if weight_format.method:
        raise UserError(
            f"{directory} is stored in {weight_format.bits} bit ({weight_format.method}), which several processes "
            "cannot load in shards. Start one process, without torchrun, or use the 16 bit model that it was made of."
        )
    if weight_format.mixed:
        dtype = torch.float32  # the weights of a layer are gathered in one type
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    config_dtype = torch.float32 if dtype == torch.float32 else weight_format.main_dtype or dtype
    with without_weights(dtype):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **{DTYPE: config_dtype})
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=ModelSource(directory).end_tokens or None)
    setattr(model.config, DTYPE, weight_format.main_dtype or dtype)
    tensors = find_tensors(model, directory)

    module = CausalLMLoss(model)
    mesh = init_device_mesh(device.torch_device.type, (distributed.world_size(),))
    # Gradients are averaged in float32. The last layer is dropped after its forward pass too: a gathered weight is not
    # a shard, and whoever saves it could mistake it for one.
    policy = MixedPrecisionPolicy(param_dtype=device.dtype, reduce_dtype=torch.float32)
    options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}
    embeddings = model.get_input_embeddings()
    parts = [layer for layer in model.modules() if type(layer).__name__ in (model._no_split_modules or ())]
    if embeddings.weight is not model.get_output_embeddings().weight:
        parts.append(embeddings)
    for part in parts:
        fully_shard(part, **options)
    fully_shard(module, **options)
    register_fsdp_forward_method(module, "require_causal")

    buffers = {name: buffer.to(device.torch_device) for name, buffer in model.named_buffers()}
    module.to_empty(device=device.torch_device)
    for name, buffer in buffers.items():  # to_empty has emptied them as well
        parent, _, buffer_name = name.rpartition(".")
        model.get_submodule(parent)._buffers[buffer_name] = buffer
    model.tie_weights()
    _read_shards(model, tensors)
    return module


@contextmanager
def without_weights(dtype: torch.dtype) -> Iterator[None]:
    """Inside, the weights of a new model take no memory, but its buffers (RoPE's frequencies) are computed.

    torch.device("meta") would leave the buffers without values as well.
    """
    register_parameter = nn.Module.register_parameter

    def register_on_meta(module, name: str, weight: Optional[nn.Parameter]) -> None:
        if weight is not None and not weight.is_meta:
            weight = nn.Parameter(weight.data.to("meta", dtype), weight.requires_grad)
        register_parameter(module, name, weight)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register_parameter


class StoredTensor(NamedTuple):
    """Where a tensor of the model is stored."""

    file: Path
    name: str


def find_tensors(model: nn.Module, directory: str) -> Dict[str, StoredTensor]:
    """For each tensor of the model, by the first of its names where it is tied, where it is stored.

    Raises UserError where the files and the model do not have the same tensors.
    """
    source = ModelSource(directory)
    if not source.safetensors_files:
        kind = "in .bin files" if source.bytes_of_weights else "not on this disk"
        raise UserError(
            f"The weights of {directory} are {kind}, and several processes cannot load them in shards. Give a "
            "directory with .safetensors files: the download scripts write them, tutorial/download_gpt_13b.py too."
        )
    file_of_tensor: Dict[str, Path] = {}
    for file in source.safetensors_files:
        with safe_open(str(file), "pt") as opened:
            file_of_tensor.update(dict.fromkeys(opened.keys(), file))
    all_names: Dict[int, List[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        all_names.setdefault(id(tensor), []).append(name)

    found: Dict[str, StoredTensor] = {}
    used = set()
    missing = []
    prefix = f"{model.base_model_prefix}."
    for names in all_names.values():
        # Files that were saved from the base model alone have names without its prefix.
        without_prefix = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        stored = [name for name in names + without_prefix if name in file_of_tensor]
        used.update(stored)
        if stored:
            found[names[0]] = StoredTensor(file_of_tensor[stored[0]], stored[0])
        else:
            missing.append(names[0])
    unexpected = [name for name in file_of_tensor if name not in used and not RECOMPUTED_BUFFERS.search(name)]
    if missing and any("expert" in name for name in unexpected):
        raise UserError(
            f"{directory} is a mixture of experts: its files hold each expert by itself, and the model all of them in "
            "one tensor, so several processes cannot load it in shards. Start one process, without torchrun."
        )
    if unexpected or missing:
        raise UserError(f"The weights of {directory} {explain_key_mismatch(model, unexpected, missing)}")
    tensors = model.state_dict()
    for name, stored in found.items():
        shape = source.tensors[stored.name]["shape"]
        if shape != list(tensors[name].shape):
            raise UserError(
                f"The model {directory} can't be loaded: config.json and weights are of different models "
                f"({stored.name} has the shape {shape} instead of {list(tensors[name].shape)}). Download both again."
            )
    return found


@torch.no_grad()
def _read_shards(model: nn.Module, stored_tensors: Dict[str, StoredTensor]) -> None:
    """Read this rank's shard of each weight, which is cut along the first dimension, and buffers as a whole."""
    opened = {stored.file: safe_open(str(stored.file), "pt") for stored in stored_tensors.values()}
    tensors = model.state_dict()
    for name, stored in stored_tensors.items():
        tensor = tensors[name]
        if not hasattr(tensor, "to_local"):
            tensor.copy_(opened[stored.file].get_tensor(stored.name))
            continue
        shard = tensor.to_local()
        rows = tensor.shape[0]
        rows_per_rank = -(-rows // distributed.world_size())  # rounded up, as torch.chunk does
        start = min(rows, distributed.rank() * rows_per_rank)
        if len(shard):
            shard.copy_(opened[stored.file].get_slice(stored.name)[start : start + len(shard)])
