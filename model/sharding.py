"""A model that no process holds whole, by PyTorch's FSDP2.

Each process keeps a slice of every weight, of its gradient and of the optimizer's states. Before a decoder layer runs
its weights are gathered, in the type of the products, and after it they are dropped again. Gradients are summed over
all processes, and each keeps the part of its slices. So a model is loaded and trained a layer at a time.
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, Optional, Tuple

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from common import distributed
from common.support.exit import UserError
from common.support.model_dir import ModelSource
from model.loss import CausalLMLoss
from model.reading import COMPUTED, DTYPE, mismatch
from model.stored import Stored


def load_in_shards(directory: str, stored: Stored, dtype: torch.dtype, device) -> CausalLMLoss:
    """The model of `directory` with its loss, in `dtype`, a slice of each weight in each process.

    Its own forward can't be called, only that of the loss, or of CausalLMLoss.require_causal. UserError where the files
    are not the same in all processes, or the weights don't lie in them as in the model, so that none can take its part.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if stored.method:
        raise UserError(
            f"{directory} is stored in {stored.bits} bit ({stored.method}), of which several processes can't each read "
            "a part. Start one process, without torchrun, or take the model that it was made of, in 16 bit."
        )
    dtype = torch.float32 if stored.mixed else dtype  # a layer's weights are gathered in one type
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    own = torch.float32 if dtype == torch.float32 else stored.most or dtype
    with _without_weights(dtype):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **{DTYPE: own})
    model.tie_weights()
    model.generation_config = GenerationConfig()
    setattr(model.config, DTYPE, stored.most or dtype)
    places = _places(model, directory)
    module = CausalLMLoss(model)
    mesh = init_device_mesh(device.torch_device.type, (distributed.world_size(),))
    # gradients are summed in float32, and layers are dropped after the forward pass, the last one too: while a weight
    # is gathered it is no slice, and could be taken for one by whoever saves it
    policy = MixedPrecisionPolicy(param_dtype=device.dtype, reduce_dtype=torch.float32)
    options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [layer for layer in model.modules() if type(layer).__name__ in (model._no_split_modules or ())]
    for part in layers + ([] if embeddings.weight is head.weight else [embeddings]):
        fully_shard(part, **options)
    fully_shard(module, **options)
    register_fsdp_forward_method(module, "require_causal")
    computed = {name: buffer.to(device.torch_device) for name, buffer in model.named_buffers()}
    module.to_empty(device=device.torch_device)
    for name, buffer in computed.items():  # to_empty has emptied them too
        holder, _, own_name = name.rpartition(".")
        model.get_submodule(holder)._buffers[own_name] = buffer
    model.tie_weights()
    _read_slices(model, places)
    return module


@contextmanager
def _without_weights(dtype: torch.dtype) -> Iterator[None]:
    """Inside, models are made whose weights take no memory; what is computed (RoPE's frequencies) is there.

    On torch's meta device these buffers would be without their numbers as well.
    """
    register = nn.Module.register_parameter

    def on_meta(module, name: str, weight: Optional[nn.Parameter]) -> None:
        if weight is not None and not weight.is_meta:
            weight = nn.Parameter(weight.data.to("meta", dtype), weight.requires_grad)
        register(module, name, weight)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _places(model: nn.Module, directory: str) -> Dict[str, Tuple[Path, str]]:
    """{name of a weight in the model: (file, its name there)}, once where tied. UserError where the two differ."""
    if not ModelSource(directory).safetensors_files:
        kind = "of the older form .bin" if ModelSource(directory).bytes_of_weights else "not on this disk"
        raise UserError(
            f"The weights of {directory} are {kind}, of which several processes can't each read a part. Give a "
            "directory with .safetensors files: the download scripts write them, tutorial/download_gpt_13b.py too."
        )
    files: Dict[str, Path] = {}
    for file in ModelSource(directory).safetensors_files:
        with safe_open(str(file), "pt") as opened:
            files.update(dict.fromkeys(opened.keys(), file))
    prefix = f"{model.base_model_prefix}."
    found: Dict[str, Tuple[Path, str]] = {}
    known, used, lacking = {}, set(), []
    for name, weight in model.state_dict(keep_vars=True).items():
        known.setdefault(id(weight), []).append(name)
    for names in known.values():
        # a file of the base model alone has not its name before all others
        ways = [*names, *(name[len(prefix) :] for name in names if name.startswith(prefix))]
        there = [way for way in ways if way in files]
        used.update(there)
        if there:
            found[names[0]] = files[there[0]], there[0]
        else:
            lacking.append(names[0])
    strange = [name for name in files if name not in used and not COMPUTED.search(name)]
    if any("expert" in name for name in strange) and lacking:
        raise UserError(
            f"{directory} is a mixture of experts whose files hold each expert alone, and the model holds them in one "
            "tensor: several processes can't each read a part. Start one process, without torchrun."
        )
    if strange or lacking:
        raise UserError(f"The weights of {directory} {mismatch(model, strange, lacking)}")
    shapes = ModelSource(directory).tensors
    live = model.state_dict()
    for name, (_, there) in found.items():
        if shapes[there]["shape"] != list(live[name].shape):
            raise UserError(
                f"The model {directory} can't be loaded: config.json and weights are of different models ({there} has "
                f"the shape {shapes[there]['shape']} in place of {list(live[name].shape)}). Download both again."
            )
    return found


@torch.no_grad()
def _read_slices(model: nn.Module, places: Dict[str, Tuple[Path, str]]) -> None:
    """Read this process's part of each weight, along its first dimension, and of buffers the whole."""
    opened = {file: safe_open(str(file), "pt") for file, _ in places.values()}
    weights = model.state_dict()
    for name, (file, there) in places.items():
        weight, whole = weights[name], opened[file].get_slice(there)
        if not hasattr(weight, "to_local"):
            weight.copy_(opened[file].get_tensor(there))
            continue
        own, length = weight.to_local(), weight.shape[0]
        start = min(length, distributed.rank() * -(-length // distributed.world_size()))  # as torch.chunk cuts it
        if len(own):
            own.copy_(whole[start : start + len(own)])
