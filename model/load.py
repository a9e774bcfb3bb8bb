"""Loads a model from its directory: to train it (`load_for_training`), or to ask or merge it (`load_model`)."""

from __future__ import annotations

from typing import Iterable, Optional

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from common import distributed
from common.device import Device, explain_out_of_memory
from common.support.cli import memory_saving_options
from common.support.exit import UserError, is_out_of_memory, short_message
from common.support.files import require_disk_space, weights_fingerprint
from common.support.model_dir import ModelSource, explain_load_error
from model.lora import (
    add_lora,
    check_gradients_of_first_step,
    disable_cpu_weight_packing,
    load_adapter,
    load_trainable_adapter,
    print_unquantized_share,
    quantization_config,
    require_bitsandbytes,
)
from model.loss import CausalLMLoss
from model.weight_format import (
    DTYPE,
    RECOMPUTED_BUFFERS,
    WeightFormat,
    cast_and_move,
    detect_format,
    explain_key_mismatch,
    forget_quantization,
    resolve_bits,
)


def load_for_training(args, plan, device: Device) -> CausalLMLoss:
    """The model of `args` on the device, with its loss as one module, ready to train.

    Without `args.use_lora` all its weights, in float32: bfloat16 has 8 significant bits, so an update of 1e-5 would be
    lost in rounding. (Matrix products are in 16 bit all the same, see Device.autocast.) With it, an adapter in float32
    on a frozen base model in 16 bit, or in `args.bits`; if `args` name an adapter, that one is trained further.
    plan: whether with gradient checkpointing. Raises UserError where the result would not fit on the disk: before the
    training, not after it.
    """
    source = ModelSource(args.model_name_or_path)
    base = source.base
    for path in sorted({base, source.path}):  # in the same order on all ranks
        distributed.require_same_on_all_ranks(weights_fingerprint(path), f"the model {path}")
    weight_format = detect_format(base)
    bits = args.bits
    dtype = torch.float32
    if args.use_lora:
        bits = resolve_bits(weight_format, args.bits or None, base)
        dtype = device.dtype
    else:
        # A result is in 16 bit at least.
        size = ModelSource(base).bytes_of_weights * 16 // min(16, weight_format.bits)
        require_disk_space(size, args.save_dir, "The trained model")
    if distributed.world_size() > 1 and not bits:
        from model.fsdp import load_sharded  # torch before 2.6 has no FSDP2

        module = load_sharded(base, weight_format, dtype, device)
    else:
        model = load_model(base, device.torch_device, dtype, bits, memory_saving_options(args))
        module = CausalLMLoss(model, static_shapes=device.static_shapes, bits=bits)
    if plan.gradient_checkpointing and not module.model.supports_gradient_checkpointing:
        kind = module.model.config.model_type
        raise UserError(f"--gradient-checkpointing: {kind} does not support it. Leave the option out.")
    if args.use_lora:
        module.model = _with_adapter(module.model, source, args)
    if not device.static_shapes:  # MoAI Platform would compile for minutes, for this one shape
        module.require_causal(base)
    if plan.gradient_checkpointing:
        enable_checkpointing(module.network)
    return module


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute the activations of each decoder layer in the backward pass, also around frozen embeddings."""
    # transformers renamed this method in version 5.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def _with_adapter(model: nn.Module, source: ModelSource, args) -> nn.Module:
    """`model` with a new adapter, or with the one of the directory `source`, which is to be trained further."""
    if source.is_adapter:
        model = load_trainable_adapter(model, source.path, args.lora_dropout)
    else:
        model = add_lora(model, source.path, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    size = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    require_disk_space(size, args.save_dir, "The adapter")
    check_gradients_of_first_step(model)
    distributed.broadcast_parameters(trained)
    return model


def load_model(
    model_dir: str,
    device: torch.device,
    dtype: Optional[torch.dtype] = torch.float32,
    bits: Optional[int] = None,
    options: Iterable[str] = ("--load-in-4bit",),
) -> nn.Module:
    """The model of `model_dir` on `device`, its weights in `dtype`, or in the type in which they are stored (None).

    If `model_dir` is an adapter, its base model with the adapter on it. bits: 4 or 8 for a quantized model, whose
    products are in `dtype`; 0 for one that is not, even if it is stored so; None for what the files say, and for the
    base model of an adapter what it was in the training. options: to name where the memory is too small. Raises
    UserError if the files are not those of a causal language model that transformers knows.
    """
    source = ModelSource(model_dir)
    base = source.base
    weight_format = detect_format(base)
    if source.is_adapter:
        if bits is None:
            bits = source.base_bits
        how = f" in {bits} bit" if bits else ""
        template = source.adapter_facts.get("template") or "not known"
        print(f"Loading adapter {model_dir} on base model {base}{how} (prompt template: {template})")
    bits = resolve_bits(weight_format, bits, base)
    if weight_format.method:
        how = f"{weight_format.bits} bit ({weight_format.method})"
        print(f"{base} is stored in {how} and is loaded in {bits or 16} bit.")
    with explain_out_of_memory(f"the model {base}", device, options):
        model = _load_base(base, weight_format, device, dtype, bits)
        # The other generation settings on the hub are for chat, and some of them cannot even be saved again.
        ends = source.end_tokens or model.generation_config.eos_token_id
        model.generation_config = GenerationConfig(eos_token_id=ends)
        setattr(model.config, DTYPE, weight_format.main_dtype or next(model.parameters()).dtype)
        # The weights that transformers leaves alone keep their files in memory; where it made new ones of the others
        # (quantized, or the experts of a layer as one tensor), copies of them let the files go.
        made_new = bits or dict(model.named_parameters()).keys() - ModelSource(base).tensors.keys()
        cast_and_move(model, device, dtype, weight_format, copy=device.type == "cpu" and bool(made_new))
        if weight_format.mixed and dtype != torch.float32:  # the weights are of two types, a product needs one
            autocast = torch.autocast(device.type, dtype or weight_format.main_dtype)
            model.forward = autocast(model.forward)
        return load_adapter(model, model_dir) if source.is_adapter else model


def _load_base(
    base: str, weight_format: WeightFormat, device: torch.device, dtype: Optional[torch.dtype], bits: int
) -> nn.Module:
    """The model as it is stored, or in 4 or 8 bit by bitsandbytes; where it is stored so and `bits` is 0, in 16 bit."""
    method = weight_format.method
    options: dict = {DTYPE: "auto"}
    compute_dtype = None
    if method == "bitsandbytes":
        require_bitsandbytes(f"{base}, which is stored in {weight_format.bits} bit,", device)
        options["device_map"] = device
        if weight_format.bits == 4:
            compute_dtype = dtype
    elif bits:
        options.update(quantization_config=quantization_config(bits, device, dtype), device_map=device)
        if not method:
            options[DTYPE] = dtype
    # In float32 at once where that is asked for: some models round factors that they compute when they are made.
    if weight_format.mixed or (dtype == torch.float32 and not method and not bits):
        options[DTYPE] = torch.float32
    model = open_checked(base, options, method, compute_dtype)
    if bits:
        disable_cpu_weight_packing(model)
        print_unquantized_share(model, bits)
    elif method:
        if method == "bitsandbytes":
            model = model.dequantize()
        forget_quantization(model)
    return model


def open_checked(base: str, options: dict, method: str = "", compute_dtype: Optional[torch.dtype] = None) -> nn.Module:
    """What transformers makes of the directory. Raises UserError if that is not all, or not only, of what it contains.

    method: how the files are quantized. compute_dtype: of the products of a model in 4 bit, not the one in its config.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # instead of its table of missing and unexpected names, we print one line
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        if method and method != "bitsandbytes":
            config.quantization_config["dequantize"] = True
        if compute_dtype:
            config.quantization_config["bnb_4bit_compute_dtype"] = str(compute_dtype).replace("torch.", "")
        model, info = AutoModelForCausalLM.from_pretrained(
            base, config=config, output_loading_info=True, trust_remote_code=False, **options
        )
    except Exception as error:  # files can be wrong in many ways, each with an exception of its own
        if is_out_of_memory(error) or isinstance(error, UserError):
            raise
        cause = explain_load_error(error) or f"{short_message(error)}. Download it again."
        raise UserError(f"The model {base} can't be loaded: {cause}") from None
    finally:
        logging.set_verbosity(verbosity)
    unexpected = [name for name in info["unexpected_keys"] if not RECOMPUTED_BUFFERS.search(name)]
    if unexpected or info["missing_keys"]:
        raise UserError(f"The weights of {base} {explain_key_mismatch(model, unexpected, info['missing_keys'])}")
    if model.config.model_type != config.model_type:  # Qwen3.5, Llama 4
        name = type(model).__name__
        print(f"{base} also reads images or sound ({config.model_type}): only its language model is loaded, as {name}.")
    return model
