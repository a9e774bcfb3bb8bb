"""What is counted of a model to plan its training: its numbers, and what a micro-batch takes, from its config alone."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from functools import lru_cache
from typing import List, NamedTuple, Tuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from common.support.exit import UserError, short_message
from common.support.model_dir import ModelSource
from model.loss import chunk_elements
from model.on_paper import are_alike, decoder_layers, enable_checkpointing, measure
from model.weight_format import DTYPE, bytes_of


class NoPlan(UserError):
    """The model can't be built from its config.json."""


class Way(NamedTuple):
    """A way to train a model."""

    method: str = "full"  # or "lora", "lora_8bit", "lora_4bit"
    checkpointing: bool = False
    tokens: int = 1024  # of a micro-batch
    length: int = 1024  # of its rows: as long as the block
    dtype: torch.dtype = torch.bfloat16  # of the matrix products; frozen weights are in it
    device: str = "cpu"  # or "cuda"
    processes: int = 1
    lora: Tuple = (16, 0.0, ("all-linear",))  # r, dropout, target modules


class Counts(NamedTuple):
    """Of a model, and of one micro-batch beside weights, gradients and optimizer states."""

    numbers: float
    linear: float  # those of them in linear layers but the output layer: a quantized base holds them in fewer bits
    trained: float
    stored: float  # bytes of its files
    activations: float  # bytes when the last layer is done
    logits: float  # bytes that the loss adds to that
    first: float  # bytes at most until the backward pass of the last layer is done
    rest: float  # bytes at most from there to the end; where that is more, the layers' number changes nothing of it
    layers: int = 1
    of_layer: float = 0.0  # numbers of one decoder layer
    traced: bool = True  # False: the bytes of a micro-batch are by a rule of thumb


def count(config, way: Way) -> Counts:
    """The counts of a model with this `config` (transformers'), trained this `way`. NoPlan where transformers can't
    build it. Layers that are alike add the same each, so that two short models tell of any length."""
    if not can_count() or (way.method != "full" and not _has_peft()):
        return _by_rule(config, way)
    with torch.random.fork_rng(devices=[]):  # what a layer on paper begins with is none of the training's numbers
        return _counted(_key(config), way)


def _counted(key: str, way: Way) -> Counts:
    # what is quantized, and how many processes there are, changes nothing of what is counted
    way = way._replace(method="full" if way.method == "full" else "lora", processes=min(way.processes, 2))
    layers, alike, _ = _build(key)
    if layers < 3 or not alike:
        whole = _count(key, way, layers)
        return whole._replace(layers=layers, of_layer=whole.numbers / layers)
    one, two = _count(key, way, 1), _count(key, way, 2)
    added = [more - less for more, less in zip(two[:7], one[:7])]
    numbers = [less + (layers - 1) * more for less, more in zip(one[:7], added)]
    return Counts(*numbers, two.rest, layers=layers, of_layer=added[0], traced=one.traced and two.traced)


def config_of(model_dir: str):
    """transformers' config of a model's directory. NoPlan: there is none, or none that transformers knows."""
    if not ModelSource(model_dir).config:
        raise NoPlan(f"{model_dir} has no config.json: give the directory of a model, as download_* writes it.")
    try:
        return AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    except Exception as error:  # each way in which it can be wrong has a type of its own
        raise NoPlan(f"transformers does not know the model of {model_dir}: {short_message(error)}") from None


def can_checkpoint(config) -> bool:
    """Whether transformers has gradient checkpointing for the model."""
    with torch.random.fork_rng(devices=[]):
        return _build(_key(config)).checkpointing


def can_count() -> bool:
    """torch 2.2 is the first: 2.1 does not tell when a tensor's memory is free, and ends with a segmentation fault."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 2)


_CONFIGS: dict = {}  # what the keys of the caches stand for


def _has_peft() -> bool:
    from model.lora import require_peft

    with contextlib.suppress(UserError):  # whoever trains is told
        require_peft()
        return True
    return False


def _key(config) -> str:
    key = config.to_json_string(use_diff=False)
    _CONFIGS[key] = config
    return key


class Build(NamedTuple):
    """How a model is made."""

    layers: int  # decoder layers
    alike: bool  # whether all of them have the same weights, by name and shape
    checkpointing: bool  # whether transformers can do gradient checkpointing with it


@lru_cache(maxsize=None)
def _build(key: str) -> Build:
    model = _on_meta(_CONFIGS[key], torch.float32)
    name = decoder_layers(model)
    layers = model.get_submodule(name) if name else [model]
    return Build(len(layers), bool(name) and are_alike(layers), model.supports_gradient_checkpointing)


def _on_meta(config, dtype: torch.dtype) -> nn.Module:
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)  # of a base that is stored so: its layers are plain here
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **{DTYPE: dtype})
    except Exception as error:  # a config that fits no model fails in many ways
        raise NoPlan(
            f"transformers can't build the {config.model_type} of config.json: {short_message(error)}"
        ) from None


@lru_cache(maxsize=None)
def _count(key: str, way: Way, layers: int) -> Counts:
    """Of the model with its first `layers` decoder layers."""
    # torch's mixed precision for several processes holds no float32 weight whole, and so makes no copies in 16 bit
    full, config = way.method == "full", _CONFIGS[key]
    dtype = torch.float32 if full and way.processes == 1 else way.dtype
    model, linear = _shortened(key, dtype, layers, () if full else way.lora)
    if way.checkpointing and _build(key).checkpointing:
        enable_checkpointing(model)
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    numbers, trained = sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
    stored = (numbers - trained * (not full)) * _bytes_stored(config)
    try:
        kept, traced = measure(model, max(1, way.tokens // way.length), way.length, way.dtype, _chunk(way)), True
    except Exception:  # it asks for numbers, or for what fake tensors have not: errors of many types
        kept, traced = _rule_of_thumb(config, way, layers), False
    return Counts(numbers, linear, trained, stored, *kept, traced=traced)


def _shortened(key: str, dtype: torch.dtype, layers: int, lora: Tuple) -> Tuple[nn.Module, int]:
    """The model with its first `layers` decoder layers, on the meta device, and the numbers in its linear layers, the
    output layer apart. lora: settings of an adapter on it, or ()."""
    model = _on_meta(_CONFIGS[key], dtype)
    name = decoder_layers(model)
    if name:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, model.get_submodule(name)[:layers])
    head = model.get_output_embeddings()
    matrices = [part.weight for part in model.modules() if isinstance(part, (nn.Linear, Conv1D)) and part is not head]
    linear = sum(weight.numel() for weight in matrices)
    if lora:
        from model.lora import add_lora

        r, dropout, targets = lora
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say is said when the model is there
            model = add_lora(model, getattr(_CONFIGS[key], "_name_or_path", ""), r, r, dropout, list(targets))
    return model, linear


def _by_rule(config, way: Way) -> Counts:
    """For a torch that can't follow a model on paper: a Llama, or GPT-2 where the config says so."""
    text = getattr(config, "text_config", config)
    width, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    r, inner = way.lora[0], getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * width
    heads = text.num_attention_heads
    query = heads * (getattr(text, "head_dim", None) or width // heads)
    beside = query * (getattr(text, "num_key_value_heads", None) or heads) // heads  # the width of keys and values
    shapes = [(width, query), (width, beside), (width, beside), (query, width)] + 3 * [(width, inner)]
    if config.model_type == "gpt2":
        shapes = [(width, 3 * width), (width, width), (width, inner), (inner, width)]
    linear = layers * sum(into * out for into, out in shapes)
    embeddings = vocabulary * width * (1 if config.tie_word_embeddings else 2)
    adapter = 0 if way.method == "full" else layers * r * sum(into + out for into, out in shapes)
    trained, numbers = adapter or linear + embeddings, linear + embeddings + adapter
    kept = _rule_of_thumb(config, way, layers)
    stored = (linear + embeddings) * _bytes_stored(config)
    return Counts(numbers, linear, trained, stored, *kept, layers, linear / layers, traced=False)


def _chunk(way: Way) -> int:
    return chunk_elements(torch.device(way.device))


def _bytes_stored(config) -> int:
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return bytes_of(getattr(torch, str(dtype).replace("torch.", ""), None))


def _rule_of_thumb(config, way: Way, layers: int) -> List[float]:
    """As Kept. A layer of Llama keeps 60 bytes a token and unit of width; checkpointed 4, its input, and 60 in the one
    that is computed again. The logits of a chunk exist three times in float32."""
    of_layer = way.tokens * getattr(config, "text_config", config).hidden_size
    activations = of_layer * layers * (4 if way.checkpointing else 60)
    logits = 3 * 4 * _chunk(way)
    return [activations, logits, activations + max(logits, 60 * of_layer if way.checkpointing else 0), 0]
