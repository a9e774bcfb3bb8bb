"""A model from its directory, ready to train, and back into a directory that plain transformers loads."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Optional

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers import __version__ as transformers_version

from common import UserError, is_out_of_memory
from common.accelerator import room_for
from common.files import require_room, written_whole
from common.model_directory import RUN, adapter_facts, base_of, bytes_of_weights, stored_tensors
from model.adapters import add_lora, keep_trainable, load_adapter, quantization, save_adapter
from model.loss import CausalLMLoss

# transformers renamed the argument in 4.56
DTYPE = "dtype" if tuple(map(int, transformers_version.split(".")[:2])) >= (4, 56) else "torch_dtype"
# as safetensors names them
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# what an earlier model may have left in a directory, and would be loaded with the new files
OF_A_MODEL = (
    "*config.json", "model*.safetensors*", "adapter_model.*", "pytorch_model*", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
)  # fmt: skip


def load_to_train(args, accelerator) -> CausalLMLoss:
    """The model of `args` on the accelerator with its loss, one module, ready to train.

    All its weights, in float32: bfloat16 keeps 8 bits of a weight, so steps of 1e-5 would be rounded away; the products
    are in 16 bit all the same (Accelerator.autocast). With `args.use_lora` an adapter in float32 on a base that stays
    as it is, and so can be in 16 bit, or in `args.bits`. UserError for an adapter's directory, and, before
    the training and not after it, where the result would not fit on the disk.
    """
    directory = args.model_name_or_path
    if base_of(directory) != directory:
        raise UserError(
            f"{directory} is an adapter, not a model. Train on its base again, or make one model of the two first: "
            f"python tutorial/merge_adapter.py --model-name-or-path {directory}"
        )
    if args.use_lora:
        base = load_model(directory, accelerator.device, accelerator.dtype, args.bits)
        model = add_lora(base, directory, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules)
        saved = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)
        require_room(saved, args.save_dir, "The adapter")
    else:
        require_room(bytes_of_weights(directory), args.save_dir, "The trained model")
        base = model = load_model(directory, accelerator.device)
    if args.gradient_checkpointing:
        # transformers renamed it in 5.x; the reentrant form would want gradients of the frozen embeddings
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return CausalLMLoss(model, static_shapes=accelerator.static_shapes)


def load_model(model_dir: str, device: torch.device, dtype: Optional[torch.dtype] = torch.float32, bits=None):
    """The model of `model_dir` on `device`, its weights in `dtype`; None: in the type in which they are stored.

    Of an adapter's directory: its base, with the adapter on it. `bits`: 4 or 8 to quantize, with products in `dtype`;
    None leaves an adapter's base as it was in the training. UserError: the files are no model that transformers reads,
    or not all of it, or the memory is too small.
    """
    base = base_of(model_dir)
    if base != model_dir:
        facts = adapter_facts(model_dir)
        bits = int(facts.get("base_bits", 0)) if bits is None else bits
        how = f" in {bits} bit" if bits else ""
        print(f"Adapter {model_dir} on the base {base}{how}, prompts as in {facts.get('template') or 'its training'}")
    options = quantization(bits, device, dtype) if bits else {}
    with room_for(f"the weights of {base}", bytes_of_weights(base), device):
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                base, output_loading_info=True, **{DTYPE: dtype if bits else "auto"}, **options
            )
        except Exception as error:  # each way in which files can be wrong has a type of its own
            if is_out_of_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"The model {base} can't be loaded: {reason}. Download it again.") from None
        if info["missing_keys"]:
            raise UserError(f"The weights of {base} lack {min(info['missing_keys'])}. Download it again.")
        # the hub's generation settings are for chat and differ from model to model (Llama2's can't even be saved again)
        model.generation_config = GenerationConfig()
        if bits:
            keep_trainable(model)
        else:
            setattr(model.config, DTYPE, next(model.parameters()).dtype)  # older releases leave it open
            # one by one: neither the device nor the main memory has to hold them all in the larger of the two types
            for weight in model.parameters():  # not model.to(dtype): the frequencies of RoPE, a buffer, stay in float32
                weight.data = weight.data.to(device, dtype or weight.dtype)
            model.to(device)
        return model if base == model_dir else load_adapter(model, model_dir)


def save_model(model: nn.Module, tokenizer, save_dir: str, base: str = "", run: Optional[dict] = None) -> None:
    """Save model (with or without its loss) and tokenizer, as `AutoModelForCausalLM.from_pretrained(save_dir)` loads
    them. `model` stays as it is: copies are cast.

    base: the directory whose types the weights get back; without one they are saved as they are. Of a model with an
    adapter the adapter alone is saved, as it is. run: what is to stand in run.json (common.training.train gives it).
    All of it is on the disk, and takes the place of a model that is there already in one step, before the last line.
    """
    print("Saving Model...")
    network = model.model if isinstance(model, CausalLMLoss) else model
    with written_whole(save_dir, stale=OF_A_MODEL) as new:
        if hasattr(network, "get_base_model"):  # not `peft_config`: in peft 0.17 a merged model keeps it
            save_adapter(network, new, (run or {}).get("dataset", {}).get("template", ""))
        else:
            _save_weights(network, tokenizer, new, base)
        tokenizer.save_pretrained(new)
        if run:
            finished = {**run, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            (new / RUN).write_text(json.dumps(finished, indent=2, ensure_ascii=False), encoding="utf-8")
        mode = (new / "tokenizer_config.json").stat().st_mode
        for file in new.iterdir():
            file.chmod(mode)  # safetensors lets nobody else read its files
    print(f"Model saved in {save_dir}")


def _save_weights(model, tokenizer, directory: Path, base: str) -> None:
    types = {name: TYPES[entry["dtype"]] for name, entry in stored_tensors(base).items() if entry["dtype"] in TYPES}
    of_config = getattr(model.config, DTYPE) if base else None
    most = max(types.values(), key=[*types.values()].count, default=of_config)
    copies: dict = {}  # of tied weights one
    weights = {}
    for name, weight in model.state_dict().items():
        dtype = types.get(name, most) if weight.is_floating_point() else None
        key = weight.data_ptr(), weight.shape, dtype
        weights[name] = copies.setdefault(key, weight.to("cpu", dtype or weight.dtype))
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id  # so that it stops in plain transformers too
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory, state_dict=weights, safe_serialization=True)
    if base:  # it has written down the type of the live weights
        setattr(model.config, DTYPE, most)
        model.config.save_pretrained(directory)
