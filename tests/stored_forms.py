"""A stand-in's directory in the forms in which the hub has models: each takes a plain one and writes another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = 32  # of the scales of FP8; real ones have 128


def rewritten(plain, to, change=None, **config):
    """A copy of the directory `plain`, its tensors as `change(name, tensor)` gives them, {name: tensor} or None for as
    it is; its config.json with `config`."""
    shutil.copytree(plain, to)
    tensors = {}
    for name, tensor in load_file(f"{plain}/model.safetensors").items():
        changed = change(name, tensor) if change else None
        tensors.update({name: tensor} if changed is None else changed)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, f"{to}/model.safetensors", {"format": "pt"}
    )
    settings = json.loads(Path(to, "config.json").read_text())
    Path(to, "config.json").write_text(json.dumps({**settings, **config}))
    return to


def fp8(plain, to):
    """As DeepSeek and Qwen store it: matrices in 8 bit floats, a float32 scale for each block."""

    def change(name, tensor):
        if not name.endswith("proj.weight"):
            return None
        codes, scales = _fp8(tensor)
        return {name: codes, f"{name}_scale_inv": scales}

    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return rewritten(plain, to, change, quantization_config={**quantization, "fmt": "e4m3"})


def fp8_as_plain(plain, to):
    """The same numbers as `fp8` stands for, in bfloat16."""

    def change(name, tensor):
        if not name.endswith("proj.weight"):
            return None
        codes, scales = _fp8(tensor)
        return {name: (codes.float() * _spread(scales, tensor)).to(tensor.dtype)}

    return rewritten(plain, to, change)


def bitsandbytes(plain, to, bits):
    """As unsloth's `...-bnb-4bit` models are stored."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    shutil.copytree(plain, to)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**four if bits == 4 else {"load_in_8bit": True}, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype="auto", quantization_config=config, device_map="cpu")
    model.save_pretrained(to)
    return to


def with_float32(plain, to, which, noise=1e-4):
    """Some tensors in float32, with digits that 16 bit can't hold."""
    generator = torch.Generator().manual_seed(5)

    def change(name, tensor):
        if not which(name):
            return None
        return {name: tensor.float() + noise * torch.randn(tensor.shape, generator=generator)}

    return rewritten(plain, to, change)


def as_bin(plain, to):
    """Only pytorch_model.bin, as Cerebras-GPT has."""
    rewritten(plain, to)
    torch.save(load_file(f"{to}/model.safetensors"), f"{to}/pytorch_model.bin")
    Path(to, "model.safetensors").unlink()
    return to


def renamed(plain, to, prefix):
    return rewritten(plain, to, lambda name, tensor: {prefix + name: tensor})


def _fp8(tensor):
    rows, columns = (-(-size // BLOCK) for size in tensor.shape)
    whole = torch.zeros(rows * BLOCK, columns * BLOCK)
    whole[: tensor.shape[0], : tensor.shape[1]] = tensor.float()
    blocks = whole.view(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448  # the largest number of float8_e4m3fn
    scales[scales == 0] = 1
    return (tensor.float() / _spread(scales, tensor)).to(torch.float8_e4m3fn), scales


def _spread(scales, tensor):
    whole = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return whole[: tensor.shape[0], : tensor.shape[1]]
