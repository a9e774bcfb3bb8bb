"""In which form the weights of a model are stored, and what a loaded model keeps of that."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, Iterable, NamedTuple, Optional

import torch
from torch import nn
from transformers import __version__ as transformers_version

from common.support.compat import load_mapped
from common.support.exit import UserError
from common.support.model_dir import ModelSource

# transformers renamed this argument in 4.56.
DTYPE = "dtype" if tuple(map(int, transformers_version.split(".")[:2])) >= (4, 56) else "torch_dtype"
# Old releases stored these buffers, which every model computes when it is made.
RECOMPUTED_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$|position_ids$")
# By their names in safetensors files.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bits of the quantized formats that transformers turns into 16 bit while it loads a model.
DEQUANTIZED = {"fp8": 8, "mxfp4": 4}


class WeightFormat(NamedTuple):
    """How the weights of a model are stored."""

    method: str  # how they are quantized, "bitsandbytes" or one of DEQUANTIZED; "" where they are not
    bits: int  # of most weights
    dtypes: Dict[str, torch.dtype]  # of each floating point tensor, by its name in the files; {} where quantized
    main_dtype: Optional[torch.dtype]  # of most weights, of a quantized model that of its products; None: not known

    @property
    def mixed(self) -> bool:
        """Whether some tensors are in float32 and the others in 16 bit, as the biases of some routers are."""
        return self.bits == 16 and torch.float32 in self.dtypes.values()


def detect_format(model_dir: str) -> WeightFormat:
    """The format of the model in `model_dir`; of a hub id nothing is known.

    Raises UserError for a quantized format that can be neither trained nor merged here.
    """
    source = ModelSource(model_dir)
    configs = [source.config, source.config.get("text_config") or {}]
    names = [config[key] for config in configs for key in ("dtype", "torch_dtype") if config.get(key)]
    main_dtype = getattr(torch, str(names[0]), None) if names else None
    quantization = source.config.get("quantization_config") or source.config.get("compression_config")
    if quantization:
        return _quantized_format(quantization, main_dtype or torch.bfloat16, model_dir)
    if source.tensors:
        tensors = {name: entry for name, entry in source.tensors.items() if entry["dtype"] in DTYPES}
        dtypes = {name: DTYPES[entry["dtype"]] for name, entry in tensors.items()}
        sizes = {name: torch.Size(entry["shape"]).numel() for name, entry in tensors.items()}
    else:
        weights = _tensors_of_bin_files(model_dir)
        dtypes = {name: weight.dtype for name, weight in weights.items()}
        sizes = {name: weight.numel() for name, weight in weights.items()}
    totals: Dict[torch.dtype, int] = {}
    for name, dtype in dtypes.items():
        totals[dtype] = totals.get(dtype, 0) + sizes[name]
    main_dtype = max(totals, key=totals.get, default=main_dtype)
    return WeightFormat("", 8 * bytes_of(main_dtype), dtypes, main_dtype)


def _quantized_format(quantization: dict, main_dtype: torch.dtype, model_dir: str) -> WeightFormat:
    in_4_bit = quantization.get("load_in_4bit")
    in_8_bit = quantization.get("load_in_8bit")
    method = quantization.get("quant_method") or ("bitsandbytes" if in_4_bit or in_8_bit else "unknown")
    if method == "bitsandbytes":
        return WeightFormat(method, 4 if in_4_bit else 8, {}, main_dtype)
    if method in DEQUANTIZED:
        return WeightFormat(method, DEQUANTIZED[method], {}, main_dtype)
    raise UserError(
        f"The weights of {model_dir} are stored in the format {method}, which can be neither trained nor merged here. "
        "Use the 16 bit model that it was made of; --load-in-4bit makes it as small."
    )


def _tensors_of_bin_files(model_dir: str) -> Dict[str, torch.Tensor]:
    """The floating point tensors of pytorch_model*.bin files; {} of a damaged file: loading the model reports it."""
    tensors: Dict[str, torch.Tensor] = {}
    for file in sorted(Path(model_dir).glob("pytorch_model*.bin")):
        try:
            tensors.update(load_mapped(file))
        except Exception:
            return {}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def resolve_bits(weight_format: WeightFormat, bits: Optional[int], model_dir: str) -> int:
    """The bits in which a model of this format is loaded: `bits`, or those of the files where it is None.

    Raises UserError where the model is stored in other bits than it shall be loaded in.
    """
    stored = weight_format.bits if weight_format.method == "bitsandbytes" else 0
    if bits and stored and bits != stored:
        raise UserError(
            f"{model_dir} is stored in {stored} bit, so --load-in-{bits}bit is not possible. Leave the option out, or "
            f"give --load-in-{stored}bit."
        )
    return stored if bits is None else bits


def bytes_of(dtype: Optional[torch.dtype]) -> int:
    """Bytes of one number; 2 where the type is not known."""
    return torch.empty((), dtype=dtype or torch.bfloat16).element_size()


def cast_and_move(
    model: nn.Module, device: torch.device, dtype: Optional[torch.dtype], weight_format: WeightFormat, copy: bool
) -> None:
    """Put a loaded model on `device`, its weights in `dtype` (None: as they are stored), in place.

    One weight at a time, so that no memory has to hold the model in two types. Of a mixed model, which was loaded in
    float32, the weights that 16 bit cannot hold stay in float32, because they were stored so. model.to(dtype) would
    also cast the frequencies of RoPE, a buffer that is computed in float32. copy: also copy what needs no change.
    """
    mixed = weight_format.mixed
    stored_names = model.state_dict().keys() if mixed else ()
    buffers = [buffer for name, buffer in model.named_buffers() if name in stored_names]
    for weight in (*model.parameters(), *buffers):
        if not weight.is_floating_point():
            continue
        main_dtype = weight_format.main_dtype if mixed else weight.dtype
        target = dtype or main_dtype
        if mixed and not torch.equal(weight.to(main_dtype).float(), weight):
            target = torch.float32
        weight.data = weight.data.to(device, target, copy=copy)
    model.to(device)


def forget_quantization(model: nn.Module) -> None:
    """Call it when the weights are no longer quantized, or transformers would save them as if they were."""
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model._weight_conversions = None
    model.is_quantized = False
    model.is_loaded_in_4bit = False
    model.is_loaded_in_8bit = False


def explain_key_mismatch(model: nn.Module, unexpected: Iterable[str], missing: Iterable[str]) -> str:
    """What is wrong with the names of the tensors in the files, and what to do: the end of a sentence."""
    wrappers = (("_orig_mod.", "torch.compile", "_orig_mod"), ("module.", "DataParallel", "module"))
    for prefix, wrapper, attribute in wrappers:
        # transformers 4 puts the model's own prefix in front.
        if unexpected and all(name.startswith((prefix, f"model.{prefix}")) for name in unexpected):
            return (
                f"have names that begin with {prefix}, because they were saved from within {wrapper}. Save "
                f"model.{attribute} instead of model, or remove the prefix."
            )
    problem = f"contain tensors that {type(model).__name__} has no place for:" if unexpected else "lack"
    names = sorted(unexpected or missing)
    return (
        f"{problem} {', '.join(names[:3])} ({len(names)} in all). config.json and weights are of different models, or "
        "of a model that does more than text. Download both again, or use a model for text alone."
    )
