"""A model from its directory, ready to train, and back into a directory that plain transformers loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers import __version__ as transformers_version

from common import UserError, nearest_existing

# transformers renamed the argument in 4.56
DTYPE = "dtype" if tuple(map(int, transformers_version.split(".")[:2])) >= (4, 56) else "torch_dtype"


def load_model(model_dir: str, device: torch.device, dtype: torch.dtype = torch.float32):
    """The model of `model_dir` on `device`, its weights in `dtype`.

    To train, leave it at float32: bfloat16 keeps 8 bits of a weight, so steps of 1e-5 would be rounded away; the
    products are in 16 bit all the same (Accelerator.autocast). The weights are read shard by shard, in the type in
    which they are stored, and converted on the device. UserError: the files are no model that transformers reads, or
    not all of it.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(model_dir, output_loading_info=True, **{DTYPE: "auto"})
    except Exception as error:  # each way in which files can be wrong has a type of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"The model {model_dir} can't be loaded: {reason}. Download it again.") from None
    if info["missing_keys"]:
        raise UserError(f"The weights of {model_dir} lack {min(info['missing_keys'])}. Download it again.")
    # the hub's generation settings are for chat and differ from model to model (Llama2's can't even be saved again)
    model.generation_config = GenerationConfig()
    model.stored_dtype = next(model.parameters()).dtype
    model.to(device)
    for weight in model.parameters():  # not model.to(dtype): the frequencies of RoPE, a buffer, stay in float32
        weight.data = weight.data.to(dtype)
    return model


def require_disk(model, save_dir: str) -> None:
    """UserError, before the training and not after it, where the trained model will not fit on the disk."""
    needed = sum(weight.numel() for weight in model.parameters()) * torch.finfo(model.stored_dtype).bits // 8
    free = shutil.disk_usage(nearest_existing(save_dir)).free
    if needed > free:
        raise UserError(
            f"The trained model takes {needed / 1e9:.1f} GB, and the disk of {save_dir} has {free / 1e9:.1f} GB free. "
            "Free some space, or give another --save-dir."
        )


def save_model(model, tokenizer, save_dir: str) -> None:
    """Save model and tokenizer, as `AutoModelForCausalLM.from_pretrained(save_dir)` loads them.

    The weights get the type back in which they were stored in the model directory. Everything is written into a
    directory inside `save_dir` first: a model that is there already stays whole until the new one is complete.
    """
    print("Saving Model...")
    target, temporary = Path(save_dir), Path(save_dir) / ".incomplete"
    target.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.generation_config.bos_token_id = tokenizer.bos_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id  # so that it stops in plain transformers too
        model.generation_config.pad_token_id = tokenizer.eos_token_id
        model.to(model.stored_dtype).save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        for old in target.glob("model*.safetensors*"):  # a larger model's shards would be left beside the new ones
            old.unlink()
        for file in temporary.iterdir():
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"Model saved in {save_dir}")
