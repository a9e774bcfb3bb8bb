"""The loss of a causal language model, without ever holding the vocabulary-sized logits of a whole batch."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn

from common.batches import IGNORE_INDEX
from common.support.exit import UserError
from common.trainer import eval_mode
from model.packing import enable_packing, packed_inputs

# float32 logits that exist at once: 64 MB on a CPU, 512 MB on an accelerator
CHUNK_ELEMENTS = {"cpu": 2**24}
CHUNK_ELEMENTS_ELSEWHERE = 2**27


class CausalLMLoss(nn.Module):
    """Any causal language model of transformers, with its loss: one module, one forward.

    Its forward takes the fields of a MicroBatch and returns the *sum* of the cross entropy over the label positions,
    float32 []. Divided by the label tokens of a whole batch and added up over its micro-batches, that is the loss of
    the one padded batch. `bits` is 4 or 8 where the base is quantized, else 0.

    Where the output layer is a plain matrix product, only positions with a label go through it, a chunk at a time.
    Where the model does more to its logits (scaling: Granite, Cohere; soft cap: Gemma 2), and with `static_shapes`,
    where picking positions would make a new shape each step, the model's own forward makes the logits.
    """

    def __init__(self, model: nn.Module, static_shapes: bool = False, bits: int = 0):
        super().__init__()
        self.model = model
        self.bits = bits
        # None: asked at the first forward, for a model on the meta device, or in shards, can't answer before
        self.own_head: Optional[bool] = True if static_shapes else None

    @property
    def network(self) -> nn.Module:
        """The model whose forward is called: an adapter is a part of its layers, so that of the base."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        cu_seq_lens: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        network = self.network
        if self.own_head is None:
            self.own_head = not has_plain_head(network)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if cu_seq_lens is not None:
            batch.update(packed_inputs(cu_seq_lens))
        targets = labels[:, 1:]  # the hidden state of a position predicts the next token
        if self.own_head:
            logits = network(**batch).logits[:, :-1]
            return F.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            )
        head = network.get_output_embeddings()
        hidden = network.base_model(**batch)[0]
        chosen = targets != IGNORE_INDEX
        weight, bias = head.weight, head.bias
        if not torch.is_grad_enabled():  # a Function makes gradients for whatever asks for them, even then
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return ChunkedCrossEntropy.apply(hidden[:, :-1][chosen], weight, bias, targets[chosen], chunk_of(hidden.device))

    def enable_packing(self, longest: int) -> bool:
        """Let the model take packed rows of at most `longest` tokens; whether it can."""
        return enable_packing(self.network, longest)

    def require_causal(self, model_dir: str) -> None:
        """UserError where a position of the model sees later tokens."""
        require_causal(self.network, model_dir)


def chunk_of(device: torch.device) -> int:
    """Elements of the logits that exist at once on this device."""
    return CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS_ELSEWHERE)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropy of `hidden @ weight.T + bias`, its gradients made in the forward pass.

    hidden [positions, width], weight [vocabulary, width], bias [vocabulary] or None, targets int64 [positions];
    elements: of the logits that may exist at once.
    While a chunk's logits are there, its gradients cost two matrix products, and nothing has to be kept or computed
    again: the idea of Liger Kernel's fused linear cross entropy (https://arxiv.org/abs/2410.10989), in plain torch.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, elements):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        # in float32 where several processes have gathered a weight in 16 bit: it is a sum over the chunks
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        # under autocast a product of slices tells the type of all the products; converting once beats once a chunk
        dtype = F.linear(hidden[:1], weight[:1]).dtype
        product_weight = weight.to(dtype)
        rows = max(1, min(len(hidden), elements // len(weight)))
        of_product = torch.empty((rows, len(weight)), dtype=dtype, device=hidden.device)  # all chunks use it
        in_float32 = of_product
        if dtype != torch.float32:
            in_float32 = torch.empty(of_product.shape, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part, target = hidden[start : start + rows].to(dtype), targets[start : start + rows]
            product = torch.mm(part, product_weight.t(), out=of_product[: len(part)])
            logits = product if dtype == torch.float32 else in_float32[: len(part)].copy_(product)
            if bias is not None:
                logits += bias
            each = torch.arange(len(target), device=target.device)
            largest, of_target = logits.amax(dim=1), logits[each, target]
            shares = torch.softmax(logits, dim=1, out=logits)
            # the sum of all exp(logit) is exp(largest) / its share, which is never too small for its logarithm
            total += (largest - shares.amax(dim=1).log() - of_target).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            # d loss / d logits = softmax - one-hot; it takes the place of the logits
            shares[each, target] -= 1
            if need_bias:
                grad_bias += shares.sum(0)
            grad = shares if dtype == torch.float32 else product.copy_(shares)
            if need_hidden:
                grad_hidden[start : start + rows] = grad @ product_weight
            if need_weight and dtype == torch.float32:
                grad_weight.addmm_(grad.t(), part)
            elif need_weight:
                grad_weight += grad.t() @ part
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        of_hidden, of_weight, of_bias = (None if grad is None else grad.mul_(grad_output) for grad in ctx.saved_tensors)
        return of_hidden, of_weight, of_bias, None, None


def has_plain_head(model: nn.Module) -> bool:
    """Whether the model's logits are the product of its last hidden state and its output layer, and nothing more.

    Asked of the model itself, in one forward pass over three tokens: what goes into the output layer must be what the
    base model returns, and what comes out must be the logits. For the question the output is made a thousand times
    larger, so that a soft cap shows even where an untrained model's logits are small.
    """
    head = model.get_output_embeddings()
    base = getattr(model, "base_model", model)
    if type(head) is not nn.Linear or base is model:
        return False
    seen = {}

    def after_base(module, inputs, output):
        seen["base"] = output[0]

    def after_head(module, inputs, output):
        seen["head_in"], seen["head_out"] = inputs[0], output * 1000
        return seen["head_out"]

    hooks = [base.register_forward_hook(after_base), head.register_forward_hook(after_head)]
    try:
        with eval_mode(model):
            ids = torch.tensor([[0, 1, 2]], device=head.weight.device)
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
        torch.clear_autocast_cache()  # torch 2.1 would go on with the weights cast here, which pass no gradient on
    return (
        len(seen) == 3  # OPT goes past its base model
        and torch.equal(seen["base"], seen["head_in"])
        and torch.equal(logits, seen["head_out"].to(logits.dtype))
    )


def require_causal(model: nn.Module, model_dir: str) -> None:
    """UserError where a position of the model sees later tokens (BERT, Roberta): it would be trained with the answer
    before its eyes.

    Asked of the model itself: twelve tokens twice, the second half of them changed. The first half's positions must
    not move. Those of MoE do by rounding, because the tokens are grouped otherwise; one may take another expert.
    """
    rows, half = len(model.get_input_embeddings().weight), 6
    ids = torch.arange(3 * half, device=model.device) + rows // 2  # pad and other special tokens stand at the ends
    with eval_mode(model):
        one, other = (
            model(input_ids=(tail % rows)[None], use_cache=False).logits[0].float()
            for tail in (ids[: 2 * half], torch.cat([ids[:half], ids[2 * half :]]))
        )
    moved = (one - other).abs().amax(1)
    of_experts = any("expert" in name for name, _ in model.named_parameters())
    if moved[:half].median() > (0.03 if of_experts else 0.001) * moved[half:].median():
        raise UserError(
            f"{model_dir} is no causal language model: what it says at a place depends on later tokens, so it would be "
            "trained with the answer before its eyes. Take a causal one (Llama, Mistral, GPT)."
        )
