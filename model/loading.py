"""A model from its directory, ready to train, and back into a directory that plain transformers loads."""

from __future__ import annotations

import json
import time
from inspect import signature
from pathlib import Path
from typing import Optional

import torch
from torch import nn
from transformers import GenerationConfig

from common import distributed
from common.checkpoint import list_checkpoints
from common.dataset_file import stop_token_ids
from common.device import explain_out_of_memory
from common.support.cli import memory_saving_options
from common.support.exit import UserError, disk_problem, short_message, without_secrets
from common.support.files import atomic_write, require_disk_space, weights_fingerprint
from common.support.model_dir import RUN, ModelSource
from model.adapters import add_lora, go_on_with, load_adapter, save_adapter
from model.loss import CausalLMLoss
from model.quantization import keep_trainable, tell_what_is_not_in_bits
from model.reading import DTYPE, from_files
from model.result import check_saved, complete_config, save_tokenizer, weights_to_save
from model.stored import bits_to_use, forget_quantization, how_stored, move
from model.writing import write_gathered

# what an earlier model may have left in a directory, and would be loaded with the new files
OF_A_MODEL = (
    "*config.json", "model*.safetensors*", "adapter_model.*", "pytorch_model*", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "additional_chat_templates",
)  # fmt: skip


def load_for_training(args, plan, device) -> CausalLMLoss:
    """The model of `args` on the device with its loss, one module, ready to train.

    All its weights, in float32: bfloat16 keeps 8 bits of a weight, so steps of 1e-5 would be rounded away; the products
    are in 16 bit all the same (Device.autocast). With `args.use_lora` an adapter in float32 on a frozen base, which can
    be in 16 bit, or in `args.bits`; where `args` name an adapter, that adapter on its base. `plan` says whether with
    gradient checkpointing. UserError, before the training and not after it, where the result would not fit on the disk.
    """
    directory = ModelSource(args.model_name_or_path).base
    for path in sorted({directory, args.model_name_or_path}):  # in one order on all ranks
        distributed.require_same_on_all_ranks(weights_fingerprint(path), f"the model {path}")
    stored = how_stored(directory)
    bits = args.bits
    if args.use_lora:
        bits = bits_to_use(stored, args.bits or None, directory)
    else:
        in_16_bit = 16 // min(16, stored.bits)  # how many times as large as the base's files
        require_disk_space(in_16_bit * ModelSource(directory).bytes_of_weights, args.save_dir, "The trained model")
    dtype = device.dtype if args.use_lora else torch.float32
    if distributed.world_size() > 1 and not bits:
        from model.sharding import load_in_shards  # not there before torch 2.6

        module = load_in_shards(directory, stored, dtype, device)
    else:
        base = load_model(directory, device.torch_device, dtype, bits, memory_saving_options(args))
        module = CausalLMLoss(base, static_shapes=device.static_shapes, bits=bits)
    base = module.model
    if args.use_lora:
        module.model = _with_adapter(base, directory, args)
    if not device.static_shapes:  # there each new shape is compiled, for minutes
        module.require_causal(directory)
    if plan.gradient_checkpointing:
        if not base.supports_gradient_checkpointing:
            raise UserError(f"--gradient-checkpointing: {base.config.model_type} has none. Leave the option out.")
        enable_checkpointing(base)
    return module


def _with_adapter(base: nn.Module, directory: str, args) -> nn.Module:
    """`base`, the model of `directory`, with a new adapter on it, or with the one that is to be trained further."""
    if args.model_name_or_path == directory:
        lora = args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules
        model = add_lora(base, directory, *lora)
    else:
        model = go_on_with(base, args.model_name_or_path, args.lora_dropout)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    require_disk_space(sum(weight.numel() * weight.element_size() for weight in trained), args.save_dir, "The adapter")
    distributed.broadcast_parameters(trained)
    return model


def enable_checkpointing(model: nn.Module) -> None:
    """Turn gradient checkpointing on for each decoder layer, in the form that works above frozen embeddings."""
    # transformers renamed it in 5.x
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})


def load_model(
    model_dir: str,
    device: torch.device,
    dtype: Optional[torch.dtype] = torch.float32,
    bits=None,
    options=("--load-in-4bit",),
):
    """The model of `model_dir` on `device`, its weights in `dtype`; None: in the type in which they are stored.

    Of an adapter's directory: its base, with the adapter on it. `bits`: 4 or 8 to quantize, with products in `dtype`;
    0: not quantized, also where the base is stored so; None: as it is stored, an adapter's base as it was in the
    training. Tensors that are stored in float32 beside others in 16 bit stay in float32. UserError: the files are no
    causal language model that transformers reads, or not all of it, or more, or the memory is too small.
    """
    base = ModelSource(model_dir).base
    stored = how_stored(base)
    if base != model_dir:
        facts = ModelSource(model_dir).adapter_facts
        bits = int(facts["base_bits"]) if bits is None and "base_bits" in facts else bits
        how = f" in {bits} bit" if bits else ""
        print(f"Adapter {model_dir} on the base {base}{how}, prompts as in {facts.get('template') or 'its training'}")
    bits = bits_to_use(stored, bits, base)
    if stored.method:
        how = "16 bit" if not bits else f"{bits} bit, as with --load-in-{bits}bit"
        print(f"{base} is stored in {stored.bits} bit ({stored.method}): it is used in {how}.")
    with explain_out_of_memory(f"the model {base}", device, options):
        model = from_files(base, stored, device, dtype, bits)
        # the hub's generation settings are for chat and differ from model to model (Llama2's can't even be saved again)
        model.generation_config = GenerationConfig()
        if stored.method and not bits:
            forget_quantization(model.dequantize() if stored.method == "bitsandbytes" else model)
        if bits:
            keep_trainable(model)
            tell_what_is_not_in_bits(model, bits)
        setattr(model.config, DTYPE, stored.most or next(model.parameters()).dtype)  # older releases leave it open
        # quantized, or experts that transformers made one tensor of: the others would keep all of the files mapped
        made = bits or dict(model.named_parameters()).keys() - ModelSource(base).tensors.keys()
        move(model, device, dtype, stored, copy=device.type == "cpu" and bool(made))
        if stored.mixed and dtype != torch.float32:  # its parts are in two types, products need one
            model.forward = torch.autocast(device.type, dtype or stored.most)(model.forward)
        return model if base == model_dir else load_adapter(model, model_dir)


def save_model(model: nn.Module, tokenizer, save_dir: str, base: str = "", run: Optional[dict] = None) -> None:
    """Save model (with or without its loss) and tokenizer, as `AutoModelForCausalLM.from_pretrained(save_dir)` loads
    them, in every transformers from 4.40 on. `model` stays as it is: copies are cast.

    base: the directory whose types the weights get back; without one they are saved as they are. Of a model with an
    adapter the adapter alone is saved, as it is. run: what is to stand in run.json (common.trainer.train gives it).
    A model card comes along, where one of the two is known. All of it is on the disk, has been compared with the model,
    and takes the place of a model that is there already in one step, before the last line. UserError where it differs:
    what was there before stays.
    """
    print("Saving Model...")
    network = model.model if isinstance(model, CausalLMLoss) else model
    # a run that is finished needs its checkpoints no more: they go in the step in which the model comes
    checkpoints = [path.name for path in list_checkpoints(save_dir)] if run else []
    try:
        with distributed.on_main_process(lambda: atomic_write(save_dir, stale=(*OF_A_MODEL, *checkpoints))) as new:
            _write(network, tokenizer, new, save_dir, base, run or {})
    except Exception as error:  # safetensors has a type of its own for a disk that is full
        if not disk_problem(error):
            raise
        size = sum(weight.numel() * weight.element_size() for weight in network.parameters() if weight.requires_grad)
        raise UserError(
            f"{save_dir} can't be written: {disk_problem(error)}. Free {size / 1e9:.1f} GB there "
            "and run the same command again."
        ) from None
    print(f"Model saved in {save_dir}")


def _write(network: nn.Module, tokenizer, new: Path, save_dir: str, base: str, run: dict) -> None:
    meta = run.get("dataset", {})
    end = stop_token_ids(meta, tokenizer)[0]
    adapter = hasattr(network, "get_base_model")  # not `peft_config`: in peft 0.17 a merged model keeps it
    if not adapter:
        _save_weights(network, tokenizer, new, base, end)
    if not distributed.is_main_process():
        return
    if adapter:
        save_adapter(network, new, meta.get("template", ""))
    save_tokenizer(tokenizer, new, meta.get("chat_template"))
    if run:
        finished = {**run, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        text = without_secrets(json.dumps(finished, indent=2, ensure_ascii=False))
        (new / RUN).write_text(text, encoding="utf-8")
    if run or base:
        from model.card import write_card  # here: the way to the first step needs none

        by_chat = meta.get("chat_template", meta.get("template") == "chat")
        parts = run.get("made_of") or {"base": base or (network.get_base_model() if adapter else network).name_or_path}
        try:
            write_card(new, save_dir, parts, run, adapter, {"chat": bool(by_chat), "end": end})
        except OSError:
            raise
        except Exception as error:  # a card is not worth a trained model
            print(f"The model card was not written: {short_message(error)}")
    mode = min(new.glob("*config.json")).stat().st_mode
    for file in new.iterdir():
        file.chmod(mode)  # safetensors lets nobody else read its files


def _save_weights(model, tokenizer, directory: Path, base: str, end: int) -> None:
    stored = how_stored(base) if base else None
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = end  # so that it stops in plain transformers too
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    if distributed.world_size() > 1:
        write_gathered(model, directory, stored)
        if distributed.is_main_process():
            complete_config(directory, base, stored.most if stored else None)
        return
    weights = weights_to_save(model, stored)
    dtype = getattr(model.config, DTYPE)
    options = {"state_dict": dict(weights), "safe_serialization": True}
    if "save_original_format" in signature(model.save_pretrained).parameters:
        options["save_original_format"] = False  # they have the names of the files already
    model.save_pretrained(directory, **options)
    setattr(model.config, DTYPE, dtype)  # it has written down the type of the live weights
    check_saved(directory, weights, model, stored)
    complete_config(directory, base, stored.most if stored else None)
