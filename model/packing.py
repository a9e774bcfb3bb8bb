"""Packed rows: one after the other, without padding, each attending to itself alone."""

from __future__ import annotations

import torch
from torch import nn

from common.trainer import eval_mode

PACKED = "packed"  # the name of `packed_attention` among transformers' attention implementations


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
    for row in zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2)):
        output, _ = sdpa_attention_forward(module, *row, None, **options)
        outputs.append(output)
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


def enable_packing(model: nn.Module, longest: int) -> bool:
    """Give a model of transformers `packed_attention`; False, and no change, if it cannot take packed rows.

    Rows of up to `longest` tokens must fit into the model's attention window. Then the model itself is asked: twelve
    tokens as two packed rows must give the logits of the two rows alone. They do not if it carries a state from token
    to token, has its own attention, or does not pass cu_seq_lens_q on.
    """
    config = getattr(model.config, "text_config", model.config)
    windows = [getattr(config, name, None) or longest for name in ("sliding_window", "attention_chunk_size")]
    if getattr(model.config, "_attn_implementation", "") not in ("sdpa", PACKED) or min(windows) < longest:
        return False
    input_ids = torch.arange(12, device=model.device)[None] + len(model.get_input_embeddings().weight) // 2
    works = False
    try:
        from transformers import AttentionInterface, AttentionMaskInterface  # 4.53 and newer

        with eval_mode(model):
            first = model(input_ids=input_ids[:, :6], use_cache=False).logits
            second = model(input_ids=input_ids[:, 6:], use_cache=False).logits
            as_one_row = model(input_ids=input_ids, use_cache=False).logits
            AttentionInterface.register(PACKED, packed_attention)
            AttentionMaskInterface.register(PACKED, packed_mask)
            model.set_attn_implementation(PACKED)
            cu_seq_lens = torch.tensor([0, 6, 12], dtype=torch.int32, device=model.device)
            packed = model(input_ids=input_ids, use_cache=False, **packed_inputs(cu_seq_lens)).logits
        expected = torch.cat([first, second], dim=1)
        works = bool((packed - expected).abs().max() < 0.02 * (as_one_row - expected).abs().max())
    except Exception:  # a model that cannot do it fails in many ways
        pass
    if not works and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("sdpa")
    return works
