"""The loss of a causal language model, which never holds the logits of a whole batch: they are vocabulary-sized."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn

from common.batches import IGNORE_INDEX
from common.support.exit import UserError
from common.trainer import eval_mode
from model.packing import enable_packing, packed_inputs
from model.probe import logits_of, probe_ids

# The float32 logits that exist at once: 64 MB on a CPU, 512 MB on a GPU.
CHUNK_ELEMENTS_ON_CPU = 2**24
CHUNK_ELEMENTS = 2**27


class CausalLMLoss(nn.Module):
    """A causal language model of transformers and its loss, as one module with one forward.

    Its forward takes the fields of a MicroBatch and returns the *sum* of the cross entropy over the label positions,
    float32 []. Added up over the micro-batches of a batch and divided by its label tokens, that is the mean loss of the
    batch, however it was split. `bits` is 4 or 8 if the model is quantized, else 0.

    If the output layer is a plain matrix product, only positions with a label go through it, a chunk at a time. If the
    model does more to its logits (Granite and Cohere scale them, Gemma 2 caps them), its own forward computes all of
    them; with `static_shapes` too, where a selection of positions would have another shape in each step.
    """

    def __init__(self, model: nn.Module, static_shapes: bool = False, bits: int = 0):
        super().__init__()
        self.model = model
        self.bits = bits
        self.static_shapes = static_shapes
        # None: determined in the first forward, because a model in shards has no weights before that.
        self.own_head: Optional[bool] = True if static_shapes else None

    @property
    def network(self) -> nn.Module:
        """The model whose forward is called: of an adapter the base model, whose layers contain the adapter."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        cu_seq_lens: Optional[torch.Tensor] = None,
        positions: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        network = self.network
        if self.own_head is None:
            self.own_head = not has_plain_head(network)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if cu_seq_lens is not None:
            batch.update(packed_inputs(cu_seq_lens))
        if self.own_head:
            logits = network(**batch).logits[:, :-1].flatten(0, 1)
            targets = labels[:, 1:].flatten()  # each position predicts the next token
            return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
        head = network.get_output_embeddings()
        hidden = network.base_model(**batch)[0].flatten(0, 1)
        targets = labels.flatten()[positions + 1]
        weight = head.weight
        bias = head.bias
        if not torch.is_grad_enabled():  # ChunkedCrossEntropy would compute gradients all the same
            weight = weight.detach()
            bias = None if bias is None else bias.detach()
        return ChunkedCrossEntropy.apply(hidden, positions, weight, bias, targets, chunk_elements(hidden.device))

    def enable_packing(self, longest: int) -> bool:
        """Prepare the model for packed rows of at most `longest` tokens; False if it cannot take them."""
        return enable_packing(self.network, longest)

    def require_causal(self, model_dir: str) -> None:
        """UserError if a position of the model depends on later tokens."""
        require_causal(self.network, model_dir)


def chunk_elements(device: torch.device) -> int:
    """How many float32 logits may exist at once on this device."""
    return CHUNK_ELEMENTS_ON_CPU if device.type == "cpu" else CHUNK_ELEMENTS


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropy of `hidden[positions] @ weight.T + bias`. Its forward pass computes the gradients too.

    hidden [tokens, width]; positions, each once, and targets int64 [labels]; weight [vocabulary, width]; bias
    [vocabulary] or None; elements: how many logits may exist at once.

    As long as the logits of a chunk exist, their gradients cost two matrix products, and nothing has to be kept or
    recomputed: the idea of Liger Kernel's fused linear cross entropy (https://arxiv.org/abs/2410.10989).
    """

    @staticmethod
    def forward(ctx, hidden, positions, weight, bias, targets, elements):
        need_hidden, _, need_weight, need_bias = ctx.needs_input_grad[:4]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        # A sum over all chunks, so in float32 even if FSDP has gathered the weight in 16 bit.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        dtype = F.linear(hidden[:1], weight[:1]).dtype  # that of autocast
        product_weight = weight.to(dtype)
        rows = max(1, min(len(positions), elements // len(weight)))
        # Two buffers, which all chunks use one after the other.
        products = torch.empty((rows, len(weight)), dtype=dtype, device=hidden.device)
        float32_logits = products
        if dtype != torch.float32:
            float32_logits = torch.empty(products.shape, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(positions), rows):
            position = positions[start : start + rows]
            target = targets[start : start + rows]
            chunk = hidden[position].to(dtype)
            product = torch.mm(chunk, product_weight.t(), out=products[: len(chunk)])
            logits = product if dtype == torch.float32 else float32_logits[: len(chunk)].copy_(product)
            if bias is not None:
                logits += bias
            row = torch.arange(len(target), device=target.device)
            target_logits = logits[row, target]
            largest = logits.amax(dim=1)
            probabilities = torch.softmax(logits, dim=1, out=logits)
            # The sum of all exp(logit) is exp(largest) / its probability, whose logarithm always exists.
            loss += (largest - probabilities.amax(dim=1).log() - target_logits).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            # d loss / d logits = softmax - one-hot, which replaces the logits in their buffer.
            probabilities[row, target] -= 1
            if need_bias:
                grad_bias += probabilities.sum(0)
            grad_logits = probabilities if dtype == torch.float32 else product.copy_(probabilities)
            if need_hidden:
                grad_hidden[position] = (grad_logits @ product_weight).to(hidden.dtype)
            if need_weight and dtype == torch.float32:
                grad_weight.addmm_(grad_logits.t(), chunk)
            elif need_weight:
                grad_weight += grad_logits.t() @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        hidden, weight, bias = [None if grad is None else grad.mul_(grad_output) for grad in ctx.saved_tensors]
        return hidden, None, weight, bias, None, None


def has_plain_head(model: nn.Module) -> bool:
    """Whether the logits are the product of the last hidden state and the output layer, and nothing more.

    The model itself is asked, by a forward pass of three tokens: the output layer must get what the base model returns,
    and its output must be the logits. For this the output is multiplied by 1000, so that a cap on the logits shows even
    if those of an untrained model are small.
    """
    head = model.get_output_embeddings()
    base = getattr(model, "base_model", model)
    if type(head) is not nn.Linear or base is model:
        return False
    seen = {}

    def after_base(module, inputs, output):
        seen["base"] = output[0]

    def after_head(module, inputs, output):
        seen["head input"] = inputs[0]
        seen["head output"] = output * 1000
        return seen["head output"]

    hooks = [base.register_forward_hook(after_base), head.register_forward_hook(after_head)]
    try:
        with eval_mode(model):
            input_ids = torch.tensor([[0, 1, 2]], device=head.weight.device)
            logits = model(input_ids=input_ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
        torch.clear_autocast_cache()  # torch 2.1 would reuse weights that were cast here, and pass no gradient to them
    return (
        len(seen) == 3  # OPT does not call its base model
        and torch.equal(seen["base"], seen["head input"])
        and torch.equal(logits, seen["head output"].to(logits.dtype))
    )


def require_causal(model: nn.Module, model_dir: str) -> None:
    """UserError if a position depends on later tokens (BERT, Roberta): the model would see the answer in training.

    The model itself is asked: of twelve tokens the second half is replaced, and the logits of the first half must not
    change. With experts they change by rounding, because the tokens are grouped otherwise.
    """
    first, second, third = probe_ids(model, 18).split(6, dim=1)
    one = logits_of(model, torch.cat([first, second], dim=1))[0]
    other = logits_of(model, torch.cat([first, third], dim=1))[0]
    change = (one - other).abs().amax(1)
    has_experts = any("expert" in name for name, _ in model.named_parameters())
    tolerance = 0.03 if has_experts else 0.001
    if change[:6].median() > tolerance * change[6:].median():  # a single token may go to another expert
        raise UserError(
            f"{model_dir} is not a causal language model: its output depends on later tokens, so it would see the "
            "answers while it is trained. Use a causal language model (Llama, Mistral, GPT)."
        )
