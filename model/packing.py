"""Packed rows: one after the other, without padding, each attending to itself alone."""

from __future__ import annotations

import torch
from torch import nn

from model.probe import logits_of, probe_ids

PACKED = "packed"  # the name of `packed_attention` among transformers' attention implementations
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}  # of a config's layer_types
SHORT_ROW = 512  # Below it, a CPU's attention takes less time in float32 than in bfloat16, down to a third.
WINDOWS = ("sliding_window", "attention_chunk_size")


def packed_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, **options):
    """Causal attention within each row, as an attention function of transformers' AttentionInterface.

    query, key, value [1, heads, tokens, width]; cu_seq_lens_q int32 [rows + 1]: where each row begins. Without it, this
    is transformers' own attention.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None:
        raise ValueError("this model makes its own mask")  # packed_mask returns none
    lengths = cu_seq_lens_q.diff().tolist()
    outputs = []
    with torch.autocast(query.device.type, enabled=False):  # which would turn float32 back into bfloat16
        for row in zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2)):
            dtype = torch.float32 if row[0].shape[2] < SHORT_ROW else value.dtype
            output, _ = sdpa_attention_forward(module, *[part.to(dtype) for part in row], None, **options)
            outputs.append(output.to(value.dtype))
    return torch.cat(outputs, dim=1), None


def packed_mask(*args, attention_mask=None, **options):
    """The mask for `packed_attention`: none, unless there is padding."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **options)


def packed_inputs(cu_seq_lens: torch.Tensor) -> dict:
    """The keyword arguments with which a model of transformers gets packed rows; each row's positions begin at 0."""
    positions = torch.cat([torch.arange(length) for length in cu_seq_lens.diff().tolist()])
    return {"cu_seq_lens_q": cu_seq_lens, "position_ids": positions[None].to(cu_seq_lens.device)}


def attends_within_rows(model: nn.Module, longest: int) -> bool:
    """Whether this model connects tokens by attention alone, and all of its windows hold `longest` tokens.

    A state that goes from token to token (Mamba, LFM2) would go from one packed row into the next.
    """
    if any(getattr(module, "_is_stateful", False) for module in model.modules()):
        return False
    parts = [part for part in vars(model.config).values() if hasattr(part, "to_dict")]  # for text, images or sound
    for config in (model.config, *parts):
        if set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS:
            return False
        windows = [getattr(config, name, None) or longest for name in WINDOWS]
        if min(windows) < longest:
            return False
    return True


def enable_packing(model: nn.Module, longest: int) -> bool:
    """Give a model of transformers `packed_attention`; False, and no change, if it cannot take packed rows.

    Rows have up to `longest` tokens. What class and config say comes first. Then the model itself is asked: two packed
    rows must have the logits of the two rows alone. They do not if it has its own attention, or does not pass
    cu_seq_lens_q on.
    """
    if getattr(model.config, "_attn_implementation", "") not in ("sdpa", PACKED):
        return False
    if not attends_within_rows(model, longest):
        return False
    length = max(2, min(longest, 128) // 2)
    input_ids = probe_ids(model, 2 * length)
    works = False
    try:
        from transformers import AttentionInterface, AttentionMaskInterface  # 4.53 and newer

        alone = [logits_of(model, row) for row in input_ids.split(length, dim=1)]
        expected = torch.cat(alone, dim=1)
        as_one_row = logits_of(model, input_ids)
        AttentionInterface.register(PACKED, packed_attention)
        AttentionMaskInterface.register(PACKED, packed_mask)
        model.set_attn_implementation(PACKED)
        cu_seq_lens = torch.tensor([0, length, 2 * length], dtype=torch.int32, device=model.device)
        packed = logits_of(model, input_ids, **packed_inputs(cu_seq_lens))
        works = bool((packed - expected).abs().max() < 0.02 * (as_one_row - expected).abs().max())
    except Exception:  # a model that cannot do it fails in many ways
        pass
    if not works and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("sdpa")
    return works
