"""A micro-batch on paper: the forward and backward pass of a model without a number in it, to see what memory it takes.

torch's fake tensors (https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html) know their shape and type
alone, and go through the very code that a training goes through: transformers' layers, peft's, autocast, checkpointing.
So any architecture can be asked, at any size, in about a second.
"""

from __future__ import annotations

import weakref
from typing import Dict, List, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.loss import ChunkedCrossEntropy

MOST_CALLS = 50_000  # a Transformer of 80 layers makes some 15,000; Mamba without its kernels one for each token


class Kept(NamedTuple):
    """Bytes of one micro-batch, beside weights, gradients and optimizer states."""

    activations: int  # when the last layer is done: for the backward pass, with the 16 bit copies of weights
    logits: int  # what the loss adds to that at most
    first: int  # at most, until the backward pass of the last layer is done: it grows with the layers
    rest: int  # at most, from there to the end: where it is more, because of the embeddings, it does not


def measure(model: nn.Module, rows: int, length: int, dtype: torch.dtype, chunk_elements: int) -> Kept:
    """What a micro-batch [rows, length] takes of `model`, which is on the meta device, and of no use after this.

    Matrix products are in `dtype`, as autocast has them, every position has a label, and the gradients of an earlier
    micro-batch are there. Errors of many types where the model's way depends on the numbers, which are not there.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    model.train()
    live = _LiveBytes()
    with FakeTensorMode():
        _fill(model)
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor, counts=False)
            if tensor.requires_grad:
                tensor.grad = torch.empty_like(tensor)
                live.add(tensor.grad, counts=False)
        network = model.get_base_model() if hasattr(model, "get_base_model") else model
        with _LiveBytes():
            plain = _has_plain_head(network)
        name, first = decoder_layers(network), []

        def backward_is_done(_):
            if not first:  # with checkpointing it is asked for again in the backward pass
                first.append(live.peak)
                live.peak = live.now

        def before_last(_, inputs):
            if inputs and inputs[0].requires_grad:  # else what is below has no backward pass
                inputs[0].register_hook(backward_is_done)

        if name:
            network.get_submodule(name)[-1].register_forward_pre_hook(before_last)
        with live:
            ids = torch.zeros((rows, length), dtype=torch.int64)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
                if plain:  # as in model.loss
                    head, hidden = network.get_output_embeddings(), network.base_model(ids, use_cache=False)[0]
                    activations = live.now
                    chosen = hidden[:, :-1].flatten(0, 1)
                    del hidden
                    loss = ChunkedCrossEntropy.apply(
                        chosen, head.weight, head.bias, ids[:, 1:].flatten(), chunk_elements
                    )
                    del chosen
                else:
                    logits, activations = network(ids, use_cache=False).logits[:, :-1].flatten(0, 1), live.now
                    loss = F.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="sum")
                    del logits
            logits, live.calls = live.peak - activations, -(10**9)  # an error must not come in the midst of the engine
            loss.backward()
    return Kept(activations, logits, first[0] if first else live.peak, live.peak)


def decoder_layers(model: nn.Module) -> str:
    """The name of the list of decoder layers: of all lists the one with the most weights; "" where there is none."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    return max(lists, key=lambda name: sum(weight.numel() for weight in lists[name].parameters()), default="")


def are_alike(layers: nn.ModuleList) -> bool:
    """Whether each has the same weights, by name and shape."""
    return len({tuple((name, weight.shape) for name, weight in layer.named_parameters()) for layer in layers}) == 1


def enable_checkpointing(model: nn.Module) -> None:
    """Gradient checkpointing of each decoder layer, in the form that passes gradients around frozen embeddings."""
    # transformers renamed it in 5.x
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside, as long as somebody holds them."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes: Dict[int, int] = {}
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # more than half of all calls
            return func(*args)
        self.calls += 1
        if self.calls > MOST_CALLS:
            raise RuntimeError("too many steps to be asked for on paper")
        # torch has a rule for its shape in bfloat16 alone, and on a CPU it multiplies float32 all the same
        made = _grouped(*args, **kwargs or {}) if "_grouped_mm" in str(func) else func(*args, **kwargs or {})
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return made

    def add(self, tensor: torch.Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes() if counts else 0
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _grouped(one: torch.Tensor, other: torch.Tensor, ends=None, *_, **__) -> torch.Tensor:
    """The result of `torch._grouped_mm`, the products of MoE: rows that belong to expert after expert."""
    if one.dim() == 2 and other.dim() == 2:
        shape = [len(ends), one.shape[0], other.shape[1]]
    else:
        shape = (
            [*one.shape[:-1], other.shape[-1]] if one.dim() == 2 or other.dim() == 3 else [one.shape[1], other.shape[1]]
        )
    return one.new_empty(shape)


def _fill(model: nn.Module) -> None:
    """Put a fake tensor on the CPU in the place of each one on the meta device; what is tied stays tied."""
    made: Dict[int, torch.Tensor] = {}
    for part in model.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                fake = made.get(id(weight))
                if fake is None:
                    empty = torch.empty(weight.shape, dtype=weight.dtype)
                    fake = made[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
                part._parameters[name] = fake
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _has_plain_head(network: nn.Module) -> bool:
    """As model.loss has it, where there are no numbers to compare: whether the hidden states go into the output layer,
    and the logits come out of it, as the same piece of memory, not written to in between."""
    head, base, seen = network.get_output_embeddings(), network.base_model, {}  # type: ignore
    if type(head) is not nn.Linear or base is network:
        return False

    def same(one, other):
        places = [tensor.untyped_storage()._cdata for tensor in (one, other)]
        return places[0] == places[1] and one._version == other._version

    hooks: List = [
        base.register_forward_hook(lambda module, inputs, output: seen.update(base=output[0])),
        head.register_forward_hook(lambda module, inputs, output: seen.update(into=inputs[0], out=output)),
    ]
    with torch.no_grad():
        logits = network(torch.zeros((1, 3), dtype=torch.int64), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return len(seen) == 3 and same(seen["base"], seen["into"]) and same(seen["out"], logits)
