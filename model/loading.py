"""A model from its directory, ready to train, and back into a directory that plain transformers loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Optional

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers import __version__ as transformers_version

from common import UserError, nearest_existing
from common.download import base_of
from model.adapters import adapter_facts, add_lora, keep_trainable, load_adapter, quantization, save_adapter

# transformers renamed the argument in 4.56
DTYPE = "dtype" if tuple(map(int, transformers_version.split(".")[:2])) >= (4, 56) else "torch_dtype"


def load_to_train(args, accelerator):
    """The model of `args` on the accelerator, ready to train.

    All its weights, in float32: bfloat16 keeps 8 bits of a weight, so steps of 1e-5 would be rounded away; the products
    are in 16 bit all the same (Accelerator.autocast). With `args.use_lora` an adapter in float32 on a base that stays
    as it is, and so can be in 16 bit, or in `args.bits`. UserError for an adapter's directory.
    """
    if base_of(args.model_name_or_path) != args.model_name_or_path:
        raise UserError(
            f"{args.model_name_or_path} is an adapter, not a model. Train on its base again, or make one model of the "
            f"two first: python tutorial/merge_adapter.py --model-name-or-path {args.model_name_or_path}"
        )
    if args.use_lora:
        base = load_model(args.model_name_or_path, accelerator.device, accelerator.dtype, args.bits)
        model = add_lora(base, args)
    else:
        base = model = load_model(args.model_name_or_path, accelerator.device)
    if args.gradient_checkpointing:
        # transformers renamed it in 5.x; the reentrant form would want gradients of the frozen embeddings
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model


def load_model(model_dir: str, device: torch.device, dtype: Optional[torch.dtype] = torch.float32, bits=None):
    """The model of `model_dir` on `device`, its weights in `dtype`; None: in the type in which they are stored.

    Of an adapter's directory: its base, with the adapter on it. `bits`: 4 or 8 to quantize, with products in `dtype`;
    None leaves an adapter's base as it was in the training. UserError: the files are no model that transformers reads,
    or not all of it.
    """
    base, facts = base_of(model_dir), adapter_facts(model_dir)
    bits = int(facts.get("base_bits", 0)) if bits is None else bits
    if base != model_dir:
        how = f" in {bits} bit" if bits else ""
        print(f"Adapter {model_dir} on the base {base}{how}, prompts as in {facts.get('template') or 'its training'}")
    options = quantization(bits, device, dtype) if bits else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            base, output_loading_info=True, **{DTYPE: dtype if bits else "auto"}, **options
        )
    except Exception as error:  # each way in which files can be wrong has a type of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"The model {base} can't be loaded: {reason}. Download it again.") from None
    if info["missing_keys"]:
        raise UserError(f"The weights of {base} lack {min(info['missing_keys'])}. Download it again.")
    # the hub's generation settings are for chat and differ from model to model (Llama2's can't even be saved again)
    model.generation_config = GenerationConfig()
    model.stored_dtype = next(model.parameters()).dtype
    if bits:
        keep_trainable(model)
    else:
        # one by one: neither the device nor the main memory has to hold them all in the larger of the two types
        for weight in model.parameters():  # not model.to(dtype): the frequencies of RoPE, a buffer, stay in float32
            weight.data = weight.data.to(device, dtype or weight.dtype)
        model.to(device)
    return model if base == model_dir else load_adapter(model, model_dir)


def require_disk(model, save_dir: str) -> None:
    """UserError, before the training and not after it, where the trained model will not fit on the disk."""
    weights = list(model.parameters())
    if hasattr(model, "peft_config"):  # the adapter alone is saved, as it is
        needed = sum(weight.numel() * weight.element_size() for weight in weights if weight.requires_grad)
    else:
        needed = sum(weight.numel() for weight in weights) * torch.finfo(model.stored_dtype).bits // 8
    free = shutil.disk_usage(nearest_existing(save_dir)).free
    if needed > free:
        raise UserError(
            f"The trained model takes {needed / 1e9:.1f} GB, and the disk of {save_dir} has {free / 1e9:.1f} GB free. "
            "Free some space, or give another --save-dir."
        )


def save_model(model, tokenizer, save_dir: str, template: str = "") -> None:
    """Save model and tokenizer, as `AutoModelForCausalLM.from_pretrained(save_dir)` loads them.

    The weights get the type back in which they were stored in the model directory. Of a model with an adapter the
    adapter alone is saved, as it is, and with it the name of the prompt template that it learned. Everything is written
    into a directory inside `save_dir` first: a model that is there already stays whole until the new one is complete.
    """
    print("Saving Model...")
    target, temporary = Path(save_dir), Path(save_dir) / ".incomplete"
    target.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if hasattr(model, "peft_config"):
            save_adapter(model, temporary, template)
        else:
            model.generation_config.bos_token_id = tokenizer.bos_token_id
            model.generation_config.eos_token_id = tokenizer.eos_token_id  # so that it stops in plain transformers too
            model.generation_config.pad_token_id = tokenizer.eos_token_id
            model.to(model.stored_dtype).save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        # an earlier model's shards, or an adapter where a whole model comes now, would be loaded with the new files
        for pattern in ("model*.safetensors*", "adapter_config.json", "adapter_model.safetensors", "config.json"):
            for old in target.glob(pattern):
                old.unlink()
        mode = (temporary / "tokenizer_config.json").stat().st_mode
        for file in temporary.iterdir():
            file.chmod(mode)  # safetensors lets nobody else read its files
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"Model saved in {save_dir}")
