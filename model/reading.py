"""What transformers makes of a directory, and what is told where that is not all of it."""

from __future__ import annotations

import re
from typing import Iterable, Optional

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import __version__ as transformers_version
from transformers.utils import logging

from common.support.exit import UserError, is_out_of_memory, short_message
from common.support.model_dir import explain_load_error
from model.quantization import quantization, require_bitsandbytes
from model.stored import Stored

# transformers renamed the argument in 4.56
DTYPE = "dtype" if tuple(map(int, transformers_version.split(".")[:2])) >= (4, 56) else "torch_dtype"
# computed again whenever a model is made; old releases stored them all the same
COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$|position_ids$")


def from_files(base: str, stored: Stored, device: torch.device, dtype: Optional[torch.dtype], bits: int) -> nn.Module:
    """What transformers makes of the directory; UserError where that is not all, or not only, of what it holds."""
    # in float32 from the start also where that is asked for: some models round factors that they compute themselves
    whole = stored.mixed or (dtype == torch.float32 and not stored.method)
    options = {DTYPE: torch.float32 if whole else dtype if bits and not stored.method else "auto"}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of missing and unexpected names it prints a table; here they are one line
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        if stored.method == "bitsandbytes":
            require_bitsandbytes(f"{base}, which is stored in {stored.bits} bit,", device)
            options["device_map"] = device
            if dtype and stored.bits == 4:
                config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).replace("torch.", "")
        elif stored.method:
            config.quantization_config["dequantize"] = True
        if bits and not options.get("device_map"):
            options.update(quantization(bits, device, dtype))
        model, info = AutoModelForCausalLM.from_pretrained(
            base, config=config, output_loading_info=True, trust_remote_code=False, **options
        )
    except Exception as error:  # each way in which files can be wrong has a type of its own
        if is_out_of_memory(error) or isinstance(error, UserError):
            raise
        cause = explain_load_error(error) or f"{short_message(error)}. Download it again."
        raise UserError(f"The model {base} can't be loaded: {cause}") from None
    finally:
        logging.set_verbosity(verbosity)
    strange = [name for name in info["unexpected_keys"] if not COMPUTED.search(name)]
    if strange or info["missing_keys"]:
        raise UserError(f"The weights of {base} {mismatch(model, strange, info['missing_keys'])}")
    return model


def mismatch(model: nn.Module, strange: Iterable[str], lacking: Iterable[str]) -> str:
    """What is wrong with the names of the weights in the files, and what helps."""
    for prefix, maker, inside in (("_orig_mod.", "torch.compile", "_orig_mod"), ("module.", "DataParallel", "module")):
        # transformers 4 puts the model's own name before it
        if strange and all(name.startswith((prefix, f"model.{prefix}")) for name in strange):
            return (
                f"have names that begin with {prefix}: they were saved from within {maker}. Save model.{inside} in "
                "place of model, or take the prefix away."
            )
    what = f"hold what {type(model).__name__} has no place for," if strange else "lack"
    names = sorted(strange or lacking)
    return (
        f"{what} {', '.join(names[:3])} ({len(names)} in all). config.json and weights are of two models, or of one "
        "that does more than text. Download both again, or take one of text alone."
    )
