"""Rows one after the other in one, without padding: each is calculated as if it were alone."""

from __future__ import annotations

from typing import Optional

import torch
from torch import nn

from common.trainer import eval_mode

BY_ROW = "by_row"  # the name of `attend_by_row` among transformers' attentions


def attend_by_row(module, query, key, value, attention_mask, **options):
    """Causal attention inside of each row, as transformers' AttentionInterface wants it.

    query, key, value [1, heads, tokens, width]; attention_mask int64 [1, 1, 1, rows]: the tokens of each row. Any other
    is a mask as ever.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as attend

    if not is_packed(attention_mask):
        return attend(module, query, key, value, attention_mask, **options)
    lengths = attention_mask.flatten().tolist()
    rows = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
    return torch.cat([attend(module, *row, None, **options)[0] for row in rows], dim=1), None


def is_packed(attention_mask: Optional[torch.Tensor]) -> bool:
    """Whether it is the lengths of packed rows. A mask of four dimensions is handed on by transformers as it is."""
    return attention_mask is not None and attention_mask.dim() == 4 and attention_mask.dtype == torch.int64


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """The positions of the tokens of packed rows, int64 [1, tokens]: each row begins at 0."""
    return torch.cat([torch.arange(length) for length in attention_mask.flatten().tolist()])[None].to(attention_mask)


def let_pack(model: nn.Module, longest: int) -> bool:
    """Change the attention of a model of transformers so that it takes packed rows; whether it can take them.

    Asked of the model itself: twelve tokens as two packed rows must give the logits of both rows alone. Where they do
    not (a state that goes on from token to token, attention of the model's own), or where rows may be longer than the
    window that a token sees, of `longest` tokens, the model is left as it was.
    """
    config = model.config
    windows = [getattr(config, name, None) or longest for name in ("sliding_window", "attention_chunk_size")]
    if getattr(config, "_attn_implementation", "") not in ("sdpa", BY_ROW) or min(windows) < longest:
        return False
    ids = torch.arange(12, device=model.device)[None] + len(model.get_input_embeddings().weight) // 2
    packs = False
    try:
        from transformers import AttentionInterface, AttentionMaskInterface  # 4.53 and newer
        from transformers.masking_utils import sdpa_mask

        with eval_mode(model):
            one_row, *alone = (model(input_ids=part, use_cache=False).logits for part in (ids, ids[:, :6], ids[:, 6:]))
            expected = torch.cat(alone, dim=1)
            AttentionInterface.register(BY_ROW, attend_by_row)
            AttentionMaskInterface.register(BY_ROW, sdpa_mask)
            model.set_attn_implementation(BY_ROW)
            mask = torch.tensor([[[[6, 6]]]], device=model.device)
            found = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
            packs = bool((found - expected).abs().max() < 0.02 * (one_row - expected).abs().max())
    except Exception:  # a model that does not know how fails in whatever way
        pass
    if not packs and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("sdpa")
    return packs
