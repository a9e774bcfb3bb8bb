"""A model from its directory, ready to train, and back into a directory that plain transformers loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers import __version__ as transformers_version

from common import UserError

# transformers renamed the argument in 4.56
DTYPE = "dtype" if tuple(map(int, transformers_version.split(".")[:2])) >= (4, 56) else "torch_dtype"


def load_model(model_dir: str, device: torch.device, dtype: torch.dtype, block_size: int = 1):
    """The model of `model_dir` on `device`, its weights in `dtype`.

    To train, take float32: bfloat16 keeps 8 bits of a weight, so steps of 1e-5 would be rounded away; the products are
    in 16 bit all the same (Accelerator.autocast). The weights are read shard by shard, in the type in which they are
    stored, and converted on the device. UserError: the files are no model that transformers reads, or `block_size`
    is beyond the positions that the model has.
    """
    try:
        config = AutoConfig.from_pretrained(model_dir)
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and block_size > positions:
            raise UserError(
                f"--block-size {block_size} is beyond the {positions} positions of {model_dir}; take fewer."
            )
        model = AutoModelForCausalLM.from_pretrained(model_dir, config=config, **{DTYPE: "auto"})
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"The model {model_dir} can't be loaded: {reason}.") from None
    # the hub's generation settings are for chat and differ from model to model (Llama2's can't even be saved again)
    model.generation_config = GenerationConfig()
    stored = next(model.parameters()).dtype
    model.to(device=device, dtype=dtype)
    model.stored_dtype = stored
    return model


def require_save_dir(save_dir: str) -> None:
    """UserError, before any work is done, where no directory can be made at `save_dir`."""
    for path in [Path(save_dir), *Path(save_dir).parents]:
        if path.exists():
            if not path.is_dir():
                raise UserError(
                    f"{path} is a file, so the model can't be saved in {save_dir}. Give another --save-dir."
                )
            return


def save_model(model, tokenizer, save_dir: str) -> None:
    """Save model and tokenizer, as `AutoModelForCausalLM.from_pretrained(save_dir)` loads them.

    The weights get the type back in which they were stored in the model directory. Everything is written into a
    directory beside it first: a model that is in `save_dir` already stays whole until the new one is complete.
    """
    print("Saving Model...")
    target, temporary = Path(save_dir), Path(f"{save_dir.rstrip('/')}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.generation_config.bos_token_id = tokenizer.bos_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id  # so that it stops in plain transformers too
        model.generation_config.pad_token_id = tokenizer.eos_token_id
        model.to(model.stored_dtype).save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        target.mkdir(parents=True, exist_ok=True)
        for old in target.glob("model*.safetensors*"):  # a larger model's shards would be left beside the new ones
            old.unlink()
        for file in temporary.iterdir():
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"Model saved in {save_dir}")
