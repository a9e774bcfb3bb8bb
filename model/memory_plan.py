"""The memory plan: predicts a training's peak memory, and chooses micro-batches and checkpointing that fit the device.

Everything follows from the model's config.json, the options and the lengths of the data's rows; nothing is loaded. Read
`layer_bytes`, the formula for activations, then `predict`, which adds up the rest, then `plan_memory`, which the train
scripts call. tests/benchmarks/plan_accuracy.py compares predictions with measured peaks.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from typing import Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from common import distributed
from common.batches import Batches
from common.checkpoint import Checkpoint
from common.device import Device, total_memory
from common.support.compat import has_fused_attention, meta_device
from common.support.exit import UserError, short_message
from common.support.model_dir import ModelSource
from model.lora import expert_tensors, linear_layers
from model.loss import chunk_elements
from model.weight_format import bytes_of

USABLE_FRACTION = 0.95  # of the device's memory; the rest is lost to fragmentation
METHODS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "lora_8bit": "LoRA on an 8-bit base",
    "lora_4bit": "LoRA on a 4-bit base",
}
BITS = {"lora_8bit": 8, "lora_4bit": 4}
# Bytes of a quantized parameter: NF4 with double quantization takes 4.127 bits (https://arxiv.org/abs/2305.14314).
QUANTIZED_BYTES = {"lora_8bit": 1.0, "lora_4bit": 4.127 / 8}
# Each method takes less memory than the one before. 8 bit takes twice as much as 4 bit and is slower than 16 bit.
METHOD_OPTIONS = {"full": "", "lora": " --use-lora", "lora_4bit": " --use-lora --load-in-4bit"}
METHOD_FLAGS = {"--use-lora", "--no-use-lora", "--load-in-4bit", "--load-in-8bit", "--no-quantization"}
# The formula was compared with these architectures. Any other one is treated as a Llama, and its plan is "estimated".
KNOWN_ARCHITECTURES = ("llama", "mistral", "qwen3", "gpt2")


class Overhead(NamedTuple):
    """What a device takes besides tensors."""

    program: float  # bytes of Python and its libraries, or of a GPU's kernels
    unused: float  # what is lost between the tensors of a micro-batch, as a fraction of their bytes
    heap: float  # bytes that a CPU's allocator and oneDNN keep, at most
    lengths: float  # the same, in addition, where rows have different lengths: oneDNN has a program for each shape
    quantized: float  # bytes that a quantized base is unpacked to
    quantized_parameter: float  # the same, for each quantized parameter


OVERHEAD = {
    ("cpu", torch.bfloat16): Overhead(0.45e9, 0.12, 0.40e9, 0.3e9, 0.0, 0.32),  # measured
    ("cpu", torch.float32): Overhead(0.45e9, 0.12, 0.35e9, 0.0, 0.0, 0.32),  # measured
    ("cuda", torch.bfloat16): Overhead(0.60e9, 0.05, 0.0, 0.0, 0.1e9, 0.0),  # an estimate
    ("cuda", torch.float16): Overhead(0.60e9, 0.05, 0.0, 0.0, 0.1e9, 0.0),  # an estimate
}


class CannotPlan(UserError):
    """The model can't be built from its config.json."""


class TrainingSetup(NamedTuple):
    """How a model is trained, as far as its memory depends on it."""

    method: str = "full"  # a key of METHODS
    checkpointing: bool = False
    tokens: int = 1024  # in the largest micro-batch, padding included
    dtype: torch.dtype = torch.bfloat16  # of matrix products and of frozen weights
    device: str = "cpu"  # or "cuda"
    world_size: int = 1
    lora_r: int = 16
    lora_target_modules: Tuple[str, ...] = ("all-linear",)
    one_length: bool = False  # whether all rows have the same length

    @property
    def full(self) -> bool:
        """Whether all weights are trained."""
        return self.method == "full"

    @property
    def product_bytes(self) -> int:
        """Bytes of a number in a matrix product."""
        return bytes_of(self.dtype)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a number between two layers. It has the type of the embeddings: float32 where they are trained, but
        16 bit where FSDP2 gathers them."""
        return 4 if self.full and self.world_size == 1 else self.product_bytes


class MemoryPlan(NamedTuple):
    """The bytes that a training is predicted to take on one device."""

    setup: TrainingSetup
    estimated: bool  # the formula was not compared with this architecture
    weights: float
    gradients: float
    optimizer: float
    activations: float  # what the forward pass keeps, with the 16-bit copies of the weights
    logits: float  # what the loss adds to the activations
    workspace: float  # what the backward pass adds, and what is lost between the tensors
    program: float
    result: float  # on disk
    checkpoint: float  # on disk

    @property
    def state(self) -> float:
        """The bytes in use before the first token."""
        return self.program + self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """The bytes in use at most."""
        return self.state + self.activations + self.logits + self.workspace

    @property
    def lines(self) -> List[str]:
        """What a training prints of it."""
        method = METHODS[self.setup.method]
        if self.setup.world_size > 1:
            method += f", {self.setup.world_size} processes"
        checkpointing = "on" if self.setup.checkpointing else "off"
        # In GB, all parts of a tiny model would be 0.00.
        unit, scale = ("GB", 1e9) if self.peak >= 1e9 else ("MB", 1e6)
        sizes = {name: f"{getattr(self, name) / scale:.2f}" for name in self._fields[2:]}
        parts = [f"{name} {sizes[name]}" for name in self._fields[2:9]]
        return [
            f"Memory plan: {method}, micro-batches of {self.setup.tokens} tokens, gradient checkpointing "
            f"{checkpointing}: peak {self.peak / 1e9:.2f} GB{', estimated' if self.estimated else ''}",
            f"Memory plan: {', '.join(parts)} {unit}; on disk: result {sizes['result']}, each checkpoint "
            f"{sizes['checkpoint']} {unit}",
        ]

    def compare_with_measured(self, measured: int) -> str:
        """The line at the end of a training that took `measured` bytes."""
        # torch does not count a GPU's kernels.
        predicted = self.peak - (self.program if self.setup.device == "cuda" else 0)
        return (
            f"Memory plan: predicted peak {predicted / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB "
            f"({predicted / measured - 1:+.0%})"
        )


class TrainingPlan(NamedTuple):
    """How a training uses the memory: what `plan_memory` chose, and its prediction."""

    micro_batch_tokens: int
    gradient_checkpointing: bool
    prediction: Optional[MemoryPlan] = None  # None on MoAI Platform, and for a model that can't be built


# ------------------------------------------------------------------------------------------------ the model's sizes


def read_config(model_dir: str):
    """transformers' config of the model in `model_dir`. CannotPlan where transformers can't read it."""
    try:
        return AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    except Exception as error:  # each way in which it can be wrong has a type of its own
        raise CannotPlan(f"transformers does not know the model of {model_dir}: {short_message(error)}") from None


class Matrix(NamedTuple):
    """The weight of a linear layer, or of one expert of a mixture of experts."""

    name: str
    inputs: int
    outputs: int


class ModelShape:
    """The sizes of a causal language model with this config (transformers').

    Where `model` is given, its parameters are counted. Else they follow from the config, for KNOWN_ARCHITECTURES only.
    """

    def __init__(self, config, model: Optional[nn.Module] = None):
        config = getattr(config, "text_config", None) or config
        self.architecture = config.model_type
        self.num_layers = config.num_hidden_layers
        self.vocabulary = config.vocab_size
        self.tied = bool(_first(config, "tie_word_embeddings"))  # the output layer is the embedding matrix
        # A model that scales or caps its logits needs all of them at once: the loss can't be computed in chunks.
        self.needs_all_logits = bool(_first(config, "final_logit_softcapping", "logit_scale", "logits_scaling"))
        self.hidden = config.hidden_size
        heads = _first(config, "num_attention_heads") or 1
        head_size = _first(config, "head_dim") or self.hidden // heads
        self.query = heads * head_size  # of all heads together
        self.key_value = head_size * (_first(config, "num_key_value_heads") or heads)
        self.mlp = _first(config, "moe_intermediate_size", "intermediate_size", "n_inner") or 4 * self.hidden
        self.mlp *= _first(config, "num_experts_per_tok") or 1  # a token visits several experts
        if self.architecture == "gpt2":
            self.layer = self._gpt2_layer()
            # Tensors of the size of the MLP that it keeps. The older gelu_new consists of four operations.
            self.mlp_tensors = 4 if config.activation_function == "gelu_new" else 1
        else:
            self.layer = self._llama_layer()
            self.mlp_tensors = 3  # gate, its activation, and up
        self.bytes_stored = bytes_of(_dtype_of(config))  # of a parameter in the model's files
        self.has_checkpointing = True
        self.num_expert_parameters = 0
        self.matrices = self.layer * self.num_layers  # all but the output layer
        if model is None:
            self.num_parameters = self._num_parameters(config, head_size)
        else:
            self._count(model)

    def _llama_layer(self) -> List[Matrix]:
        return [
            Matrix("q_proj", self.hidden, self.query),
            Matrix("k_proj", self.hidden, self.key_value),
            Matrix("v_proj", self.hidden, self.key_value),
            Matrix("o_proj", self.query, self.hidden),
            Matrix("gate_proj", self.hidden, self.mlp),
            Matrix("up_proj", self.hidden, self.mlp),
            Matrix("down_proj", self.mlp, self.hidden),
        ]

    def _gpt2_layer(self) -> List[Matrix]:
        return [
            Matrix("c_attn", self.hidden, 3 * self.hidden),
            Matrix("c_proj", self.hidden, self.hidden),
            Matrix("c_fc", self.hidden, self.mlp),
            Matrix("c_proj", self.mlp, self.hidden),
        ]

    def _num_parameters(self, config, head_size: int) -> int:
        norms = (2 * self.num_layers + 1) * self.hidden
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        count = num_weights(self.matrices) + embeddings + norms
        if self.architecture == "gpt2":  # positions, and biases of norms and linear layers
            count += config.n_positions * self.hidden + norms + sum(matrix.outputs for matrix in self.matrices)
        if self.architecture == "qwen3":  # norms of queries and keys
            count += 2 * head_size * self.num_layers
        return count

    def _count(self, model: nn.Module) -> None:
        matrices = [Matrix(name.split(".")[-1], *layer.weight.shape) for name, layer in linear_layers(model)]
        experts = []
        for _, experts_of_layer in expert_tensors(model):
            experts += [Matrix("experts", *experts_of_layer.shape[1:])] * len(experts_of_layer)
        self.matrices = matrices + experts
        self.num_expert_parameters = num_weights(experts)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.has_checkpointing = model.supports_gradient_checkpointing


def build_shape(config) -> ModelShape:
    """The sizes of the model with this config, which is built on torch's meta device: there weights take no memory.

    CannotPlan where transformers can't build it.
    """
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)  # quantized layers are no plain linear layers
    try:
        # The plan must not change the random numbers of the training.
        with torch.random.fork_rng(devices=[]), meta_device():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.tie_weights()  # accelerate unties them
        return ModelShape(config, model)
    except Exception as error:  # a config that fits no model fails in many ways
        raise CannotPlan(
            f"transformers can't build the {config.model_type} of config.json: {short_message(error)}"
        ) from None


def _dtype_of(config) -> Optional[torch.dtype]:
    name = _first(config, "dtype", "torch_dtype")  # transformers renamed it in 4.56
    return getattr(torch, str(name).replace("torch.", ""), None)


def _first(config, *names: str):
    """The first of these settings that the config has and that is not 0; None where there is none."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value), None)


def num_weights(matrices: List[Matrix]) -> int:
    """The number of weights in these matrices."""
    return sum(matrix.inputs * matrix.outputs for matrix in matrices)


# ------------------------------------------------------------------------------------------------ the prediction


def layer_bytes(shape: ModelShape, setup: TrainingSetup) -> int:
    """Bytes that one decoder layer keeps of each token for the backward pass: what torch's autograd saves.

    Norms are computed in float32, matrix products in `setup.dtype`. Under autocast each linear layer makes a 16-bit
    copy of its input, and keeps it where its weight is trained or has an adapter.
    """
    product = setup.product_bytes
    norm = setup.hidden_bytes  # LayerNorm keeps its input
    if shape.architecture != "gpt2":  # RMSNorm keeps it in float32, and where it is trained the normalized input too
        norm = 4 + setup.hidden_bytes if setup.full else 4
    norms = 2 * norm * shape.hidden
    if shape.architecture == "qwen3":  # norms of queries and keys
        norms += (4 + product if setup.full else 4) * (shape.query + shape.key_value)
    attention = product * (2 * shape.query + 2 * shape.key_value)  # q, k, v and the output
    mlp = product * shape.mlp_tensors * shape.mlp
    inputs = sum(matrix.inputs for matrix in trained_matrices(shape.layer, setup))
    if setup.hidden_bytes == product and (setup.full or product == 4):  # no copies: q, k, v and gate, up share an input
        inputs = min(inputs, 2 * shape.hidden + shape.query + shape.mlp)
    return norms + attention + mlp + product * inputs


def trained_matrices(matrices: List[Matrix], setup: TrainingSetup) -> List[Matrix]:
    """Those that are trained or have an adapter."""
    names = setup.lora_target_modules
    if setup.full or "all-linear" in names:
        return matrices
    return [matrix for matrix in matrices if matrix.name in names]


def micro_batch_bytes(shape: ModelShape, setup: TrainingSetup) -> Tuple[float, float, float]:
    """(activations after the forward pass, what the loss adds to them, peak of the micro-batch) in bytes."""
    product = setup.product_bytes
    layer = setup.tokens * layer_bytes(shape, setup)
    layer_input = setup.tokens * setup.hidden_bytes * shape.hidden
    linear = num_weights(shape.matrices) - shape.num_expert_parameters
    copied = 0  # weights of which autocast makes a 16-bit copy; those that FSDP2 gathers are in 16 bit already
    if not setup.full:
        copied = adapter_size(shape, setup)
        layer += product * shape.num_expert_parameters / shape.num_layers  # peft adds adapters to copies of the experts
    elif setup.world_size == 1:
        copied = linear
    copies = product * copied if product < 4 else 0
    activations = shape.num_layers * (layer_input if setup.checkpointing else layer) + copies

    # The logits of a chunk in float32 and 16 bit, the hidden states of the labels, and their gradient.
    rows = max(1, min(setup.tokens, chunk_elements(torch.device(setup.device)) // shape.vocabulary))
    if shape.needs_all_logits:
        rows = 2 * setup.tokens
    logits = rows * shape.vocabulary * (4 + product if product < 4 else 4) + 2 * layer_input
    output_layer = shape.vocabulary * shape.hidden
    if setup.full:  # its gradient in float32, that of a chunk in 16 bit, and a copy of the weight
        logits += 4 * output_layer
        if product < 4:
            logits += product * output_layer * (2 if setup.world_size == 1 else 1)

    peaks = [activations + logits]
    if setup.checkpointing:  # one layer is computed again, and its gradients take about half as much
        peaks.append(shape.num_layers * layer_input + 1.5 * layer)
    if setup.full:  # at the end the embeddings' gradient; of a tied matrix those of both uses, and their sum
        peaks.append(setup.hidden_bytes * output_layer * (3 if shape.tied else 1))
    return activations, logits, max(peaks)


def adapter_size(shape: ModelShape, setup: TrainingSetup) -> int:
    """Parameters of a LoRA adapter: r * (inputs + outputs) for each matrix."""
    return sum(setup.lora_r * (matrix.inputs + matrix.outputs) for matrix in trained_matrices(shape.matrices, setup))


def predict(shape: ModelShape, setup: TrainingSetup) -> MemoryPlan:
    """What a training takes on each device.

    With FSDP2 a device holds its share of each weight; but a quantized base and an adapter are on each device.
    """
    quantized = setup.method in BITS
    overhead = OVERHEAD[setup.device, setup.dtype]
    linear = num_weights(shape.matrices) - shape.num_expert_parameters
    shards = 1 if quantized else setup.world_size
    trained = float(shape.num_parameters if setup.full else adapter_size(shape, setup))
    on_device = trained / shards if setup.full else trained
    frozen = 0.0 if setup.full else setup.product_bytes * shape.num_parameters / shards
    if quantized:
        frozen -= (setup.product_bytes - QUANTIZED_BYTES[setup.method]) * linear
    states = 2 if quantized else 8  # bytes: AdamW keeps two numbers of each parameter, in 8 bit on a quantized base

    activations, logits, peak = micro_batch_bytes(shape, setup)
    workspace = peak - activations - logits + overhead.unused * peak
    heap = overhead.heap
    if not setup.one_length:
        heap += overhead.lengths
    if quantized:
        heap += overhead.quantized + overhead.quantized_parameter * linear
    workspace += min(heap, frozen + (8 + states) * trained + peak)  # a small model leaves little on the heap
    if shards > 1:  # two layers, embeddings and output layer are gathered; gradients those of one layer
        of_layer = linear / shape.num_layers
        workspace += setup.product_bytes * (shape.num_parameters - (shape.num_layers - 2) * of_layer)
        workspace += 4 * of_layer if setup.full else 0
    return MemoryPlan(
        setup=setup,
        estimated=shape.architecture not in KNOWN_ARCHITECTURES,
        weights=frozen + 4 * on_device,
        gradients=4 * on_device,
        optimizer=states * on_device,
        activations=activations,
        logits=logits,
        workspace=workspace,
        program=overhead.program,
        result=(shape.bytes_stored if setup.full else 4) * trained,
        checkpoint=(4 + states) * trained,
    )


# ------------------------------------------------------------------------------------------------ the choice


def plan_memory(args, device: Device, dataset: dict, resume: Optional[Checkpoint] = None) -> TrainingPlan:
    """Choose micro-batches and gradient checkpointing that fit into the device's memory, and print the prediction.

    What the command gives is not changed, and a resumed run keeps its choice. UserError where weights, gradients and
    optimizer states alone exceed the memory, with a command that fits.
    """
    tokens = args.micro_batch_tokens  # 0: to be chosen
    checkpointing = args.gradient_checkpointing  # None: to be chosen
    if resume:
        if tokens == resume.options["micro_batch_tokens"]:  # the interrupted command had the same value
            tokens = resume.state["micro_batch_tokens"]
        if checkpointing is None:
            checkpointing = resume.state["gradient_checkpointing"]
    micro_batch_tokens = tokens or device.micro_batch_tokens
    shape = None
    if has_fused_attention() and not device.static_shapes:
        with contextlib.suppress(CannotPlan):  # loading the model says why
            shape = build_shape(read_config(ModelSource(args.model_name_or_path).base))
    if shape is None:
        return TrainingPlan(micro_batch_tokens, bool(checkpointing))

    memory = device_memory(device)
    lengths = dataset["train"]["lengths"]
    longest_row = int(lengths.max())
    setup = TrainingSetup(
        method=_method(args),
        checkpointing=bool(checkpointing),
        tokens=min(max(micro_batch_tokens, longest_row), largest_batch(args, device, dataset["train"])),
        dtype=device.dtype,
        device=device.torch_device.type,
        world_size=distributed.world_size(),
        lora_r=args.lora_r,
        lora_target_modules=tuple(args.lora_target_modules),
        one_length=longest_row == int(lengths.min()),
    )
    choose_checkpointing = checkpointing is None and shape.has_checkpointing
    plan = first_that_fits(shape, cheaper_setups(setup, longest_row, tokens == 0, choose_checkpointing), memory)
    print(*plan.lines, sep="\n")
    if plan.state > memory:
        raise UserError(
            f"weights, gradients and optimizer states of {args.model_name_or_path} take {plan.state / 1e9:.1f} GB, "
            f"the device has {memory / 1e9:.1f} GB. {_command_that_fits(shape, plan.setup, longest_row, memory)}"
        )
    if plan.peak > memory:
        print(
            f"Memory plan: this may not fit into the device's {memory / 1e9:.1f} GB. "
            f"{_command_that_fits(shape, plan.setup, longest_row, memory)}"
        )
    if plan.setup.tokens < setup.tokens:
        micro_batch_tokens = plan.setup.tokens
    return TrainingPlan(micro_batch_tokens, plan.setup.checkpointing, plan)


def _method(args) -> str:
    if not args.use_lora:
        return "full"
    return next((name for name, bits in BITS.items() if bits == args.bits), "lora")


def device_memory(device: Device) -> float:
    """Bytes for each process: of the smallest GPU, or its share of the main memory."""
    memory = total_memory(device.torch_device)
    if device.torch_device.type == "cpu":
        memory /= distributed.local_world_size()
    return -distributed.all_reduce_max([-memory])[0]


def largest_batch(args, device: Device, rows: dict) -> int:
    """Tokens of the largest batch, or of a rank's share of it, with its padding, in the first 1000 steps."""
    batches = Batches(rows, args.batch_size, micro_batch_tokens=0)
    steps = min(1000, batches.steps_per_epoch, args.max_train_steps or 1000)
    largest = 0
    for step in range(1, steps + 1):
        for share in batches.split_over_ranks(batches.rows_for_step(step, args.seed)):
            lengths = batches.lengths[share]
            tokens = lengths.sum() if device.packs else lengths.max() * len(lengths)
            largest = max(largest, int(tokens))
    return largest


def cheaper_setups(
    setup: TrainingSetup, longest_row: int, tokens: bool = True, checkpointing: bool = True
) -> Iterator[TrainingSetup]:
    """`setup`, then setups that take less memory and more time, where `tokens` and `checkpointing` may be chosen."""
    yield setup
    if checkpointing:
        setup = setup._replace(checkpointing=True)
        yield setup
    while tokens and setup.tokens > longest_row:
        setup = setup._replace(tokens=max(longest_row, setup.tokens // 2))
        yield setup


def first_that_fits(shape: ModelShape, setups: Iterator[TrainingSetup], memory: float) -> MemoryPlan:
    """The plan of the first setup that fits into `memory` bytes; of the last one where none does."""
    for setup in setups:
        plan = predict(shape, setup)
        if plan.peak <= USABLE_FRACTION * memory:
            break
    return plan


def _command_that_fits(shape: ModelShape, setup: TrainingSetup, longest_row: int, memory: float) -> str:
    """What to do next: the command that was given, with a method that takes less memory."""
    methods = list(METHOD_OPTIONS)
    cheaper = methods[methods.index(setup.method) + 1 :] if setup.method in methods else methods[-1:]
    words = " ".join(word for word in sys.argv if word not in METHOD_FLAGS)
    start = "python"
    if setup.world_size > 1:
        start = f"torchrun --nproc-per-node {distributed.local_world_size()}"
    for method in cheaper:
        setups = cheaper_setups(setup._replace(method=method), longest_row)
        if first_that_fits(shape, setups, memory).peak <= USABLE_FRACTION * memory:
            return f"This command fits: {start} {words}{METHOD_OPTIONS[method]}"
    return "Use a larger device, several of them with torchrun, or a smaller model."
