"""How a model's weights are stored: in which types, quantized or not; and what a loaded model keeps of that."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, NamedTuple, Optional

import torch
from torch import nn

from common.support.exit import UserError
from common.support.model_dir import ModelSource

# as safetensors names them
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DEQUANTIZED = {"fp8": 8, "mxfp4": 4}  # bits of forms that transformers turns into 16 bit while it loads


class Stored(NamedTuple):
    """The form of a model on the disk."""

    method: str  # "" or how it is quantized: "bitsandbytes", or one of DEQUANTIZED
    bits: int  # of most numbers
    types: Dict[str, torch.dtype]  # of each tensor, by its name in the files; {} where quantized
    most: Optional[torch.dtype]  # the type of most numbers, of a quantized model those to compute in; None: not known

    @property
    def mixed(self) -> bool:
        """Whether some tensors are in float32 among others in 16 bit: the biases of a router, for one."""
        return self.bits == 16 and torch.float32 in self.types.values()


def how_stored(model_dir: str) -> Stored:
    """The form of the model in `model_dir`; of a hub id nothing is known. UserError for one that can't be used here."""
    config = ModelSource(model_dir).config
    inner = config.get("text_config") or {}
    named = next((part[key] for part in (config, inner) for key in ("dtype", "torch_dtype") if part.get(key)), "")
    most = getattr(torch, str(named), None)
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        return _quantized(quantization, most or torch.bfloat16, model_dir)
    tensors = ModelSource(model_dir).tensors
    types = {name: TYPES[entry["dtype"]] for name, entry in tensors.items() if entry["dtype"] in TYPES}
    types = types or _types_of_bin(model_dir)
    numbers: Dict[torch.dtype, int] = {}
    for name, dtype in types.items():
        numbers[dtype] = numbers.get(dtype, 0) + (torch.Size(tensors[name]["shape"]).numel() if tensors else 1)
    most = max(numbers, key=numbers.get, default=most)
    return Stored("", 8 * bytes_of(most), types, most)


def bits_to_use(stored: Stored, bits: Optional[int], model_dir: str) -> int:
    """`bits` (None: as it is stored) for a model of this form. UserError where it is stored in other bits."""
    of_base = stored.bits if stored.method == "bitsandbytes" else 0
    if bits and of_base and bits != of_base:
        raise UserError(
            f"{model_dir} is stored in {of_base} bit, so --load-in-{bits}bit can't be had of it. Leave the option "
            f"out, or give --load-in-{of_base}bit."
        )
    return of_base if bits is None else bits


def bytes_of(dtype: Optional[torch.dtype]) -> int:
    """Bytes of one number; 2 where the type is not known."""
    return torch.empty((), dtype=dtype or torch.bfloat16).element_size()


def forget_quantization(model: nn.Module) -> None:
    """After its weights became plain: else transformers would save them as it found them, without their scales."""
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = model._weight_conversions = None
    model.is_quantized = model.is_loaded_in_4bit = model.is_loaded_in_8bit = False


def move(model: nn.Module, device: torch.device, dtype: Optional[torch.dtype], stored: Stored, copy: bool) -> None:
    """Put a loaded model on `device`, its weights in `dtype` (None: as they are stored), one by one: neither device nor
    main memory has to hold them all in the larger of the two types. Of a mixed model, loaded in float32, those that 16
    bit can't hold stay in float32: they were stored so. Not model.to(dtype): the frequencies of RoPE, a buffer that is
    computed, stay in float32 too. `copy`: also those that are right already.
    """
    in_files = model.state_dict().keys() if stored.mixed else ()
    buffers = [buffer for name, buffer in model.named_buffers() if name in in_files]
    for weight in (*model.parameters(), *buffers):
        if not weight.is_floating_point():
            continue
        own = stored.most if stored.mixed else weight.dtype
        stays = stored.mixed and not torch.equal(weight.to(own).float(), weight)
        weight.data = weight.data.to(device, torch.float32 if stays else dtype or own, copy=copy)
    model.to(device)


def _quantized(quantization: dict, most: torch.dtype, model_dir: str) -> Stored:
    four, eight = quantization.get("load_in_4bit"), quantization.get("load_in_8bit")
    method = quantization.get("quant_method") or ("bitsandbytes" if four or eight else "unknown")
    if method == "bitsandbytes":
        return Stored(method, 4 if four else 8, {}, most)
    if method in DEQUANTIZED:
        return Stored(method, DEQUANTIZED[method], {}, most)
    raise UserError(
        f"The weights of {model_dir} are stored in the form {method}, which can neither be trained nor merged here. "
        "Take the model that it was made of, in 16 bit; --load-in-4bit makes it as small."
    )


def _types_of_bin(model_dir: str) -> Dict[str, torch.dtype]:
    """Of pytorch_model*.bin, where torch can map them (2.1) and need not read them; {} elsewhere."""
    types: Dict[str, torch.dtype] = {}
    for file in sorted(Path(model_dir).glob("pytorch_model*.bin")):
        try:
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception:  # an older torch, or a file in torch's older form
            return {}
        types.update({name: weight.dtype for name, weight in content.items() if weight.is_floating_point()})
    return types
