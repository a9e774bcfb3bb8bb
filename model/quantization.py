"""Frozen bases in 4 or 8 bit: bitsandbytes, asked for only where a reader asks for it."""

from __future__ import annotations

import torch
from torch import nn

from common.support.compat import require_package

LEAST_BITSANDBYTES = {"cpu": (0, 46)}  # the first that quantizes there
LEAST_BITSANDBYTES_ELSEWHERE = (0, 43)


def quantization(bits: int, device: torch.device, dtype: torch.dtype) -> dict:
    """The options with which transformers loads a model in `bits` (4: NF4 and double quantization; 8: LLM.int8).

    A weight is turned back into `dtype` for each product. UserError without a bitsandbytes that can do it.
    """
    require_bitsandbytes(f"--load-in-{bits}bit", device)
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**{"load_in_8bit": True} if bits == 8 else {**four, "bnb_4bit_compute_dtype": dtype})
    return {"quantization_config": config, "device_map": device}


def require_bitsandbytes(what: str, device: torch.device) -> None:
    """UserError, which begins with `what`, without a bitsandbytes that works on `device`."""
    require_package("bitsandbytes", LEAST_BITSANDBYTES.get(device.type, LEAST_BITSANDBYTES_ELSEWHERE), what)


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes (seen in 0.50) from packing 4-bit weights for a faster forward pass in evaluation on a CPU.

    Packed weights stay packed, and their products have no gradient: after a held-out loss the training would go on
    without what flows back through the base, and without an error.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def tell_what_is_not_in_bits(model: nn.Module, bits: int) -> None:
    """Print the share of a quantized model's weights that bitsandbytes left as they were: it takes linear layers alone,
    and the experts of MoE are none."""
    from model.targets import share_in_bits

    rest = 1 - share_in_bits(model)
    if rest > 0.01:
        print(f"{rest:.0%} of the weights between embeddings and output layer are not in {bits} bit: no linear layers")


def bits_of(model: nn.Module) -> int:
    """4 or 8 of a model that bitsandbytes holds, else 0."""
    if getattr(model, "is_loaded_in_8bit", False):
        return 8
    return 4 if getattr(model, "is_loaded_in_4bit", False) else 0
