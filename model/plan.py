"""What a training takes of memory and disk, said before anything is loaded: every figure of the pages comes from here.

Weights, gradients and optimizer states are counted; what a micro-batch takes besides is seen in a pass on paper
(model/on_paper.py). How near this comes to what is measured: tests/benchmarks/plan_accuracy.py, and the README's table.
"""

from __future__ import annotations

from typing import NamedTuple, Tuple

from model.counts import Way, count
from model.weight_format import bytes_of

METHODS = {"full": "every weight", "lora": "LoRA", "lora_8bit": "LoRA on 8 bit", "lora_4bit": "LoRA on 4 bit"}
BITS = {"lora_8bit": 8, "lora_4bit": 4}
# bytes of a quantized number: NF4 with double quantization has 4.127 bits (https://arxiv.org/abs/2305.14314, section 3)
QUANTIZED = {"lora_8bit": 1.0, "lora_4bit": 4.127 / 8}
# what is there before a model: on a CPU Python, torch and transformers (measured), on a GPU its kernels (an estimate)
PROGRAM = {"cpu": 0.45e9, "cuda": 0.6e9}
# what lies unused between the pieces, by the bytes of a micro-batch and in itself: on a CPU glibc's heap, oneDNN's
# programs, and what a quantized base is unpacked to (all measured); on a GPU an estimate
BETWEEN = {"cpu": 0.12, "cuda": 0.05}
HEAP = {"cpu": 0.4e9, "cuda": 0.0}
UNPACKED = {"cpu": (0.0, 0.32), "cuda": (0.1e9, 0.0)}  # in itself, and for each number that is quantized


class Plan(NamedTuple):
    """Bytes on one device."""

    way: Way
    traced: bool  # False: activations are by a rule of thumb, because the model can't be followed on paper
    program: float
    weights: float
    gradients: float
    optimizer: float
    activations: float  # of a micro-batch, when the last layer is done; with the 16 bit copies of weights
    logits: float  # what the loss adds to that
    workspace: float  # what the backward pass adds to that, and what lies between the pieces
    result: float  # on the disk
    checkpoint: float  # on the disk
    numbers: float = 0.0  # parameters, not bytes

    @property
    def state(self) -> float:
        """What is there before the first token."""
        return self.program + self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        return self.state + self.activations + self.logits + self.workspace

    @property
    def lines(self) -> Tuple[str, str]:
        """Of the log."""
        way, gb = self.way, {name: f"{size / 1e9:.2f}" for name, size in zip(self._fields[2:], self[2:])}
        processes = f", {way.processes} processes" if way.processes > 1 else ""
        how = f"{METHODS[way.method]}{processes}, {way.tokens} tokens at once"
        checkpointing = "with" if way.checkpointing else "without"
        return (
            f"Plan: {how}, {checkpointing} gradient checkpointing: {self.peak / 1e9:.2f} GB at the peak"
            f"{'' if self.traced else ', by a rule of thumb'}",
            f"Plan: weights {gb['weights']}, gradients {gb['gradients']}, optimizer {gb['optimizer']}, activations "
            f"{gb['activations']}, logits {gb['logits']}, workspace {gb['workspace']}, program {gb['program']} GB; "
            f"on the disk: result {gb['result']}, each checkpoint {gb['checkpoint']} GB",
        )

    def compare_with_measured(self, measured: int) -> str:
        """The line at the end of a training: what was predicted, and the `measured` bytes; 0: not known."""
        predicted = self.peak - (self.program if self.way.device == "cuda" else 0)  # torch does not count its kernels
        taken = f"{measured / 1e9:.2f} GB measured ({predicted / measured - 1:+.0%})" if measured else "not measured"
        return f"Plan: {predicted / 1e9:.2f} GB at the peak were predicted, {taken}"


def plan(config, way: Way) -> Plan:
    """The plan of a model with this `config` (transformers'), trained this `way`. UserError where transformers can't
    build it. Of several processes each holds its share of every weight (FSDP2), but whole adapters, and a whole base
    where it is quantized."""
    counts, full, bits = count(config, way), way.method == "full", BITS.get(way.method, 0)
    product = bytes_of(way.dtype)
    share = 1 if bits else way.processes
    frozen = 0.0 if full else (counts.numbers - counts.trained) * product
    frozen -= counts.linear * (product - QUANTIZED[way.method]) if bits else 0.0
    trained = counts.trained / (share if full else 1)
    states = 2 if bits else 8  # AdamW has two a number, on a quantized base in 8 bit
    peak = max(counts.first, counts.rest)
    workspace = peak - counts.activations - counts.logits + BETWEEN[way.device] * peak
    unpacked, of_number = UNPACKED[way.device]
    heap = HEAP[way.device] + (unpacked + of_number * counts.linear) * (bits > 0)
    workspace += min(heap, frozen + (8 + states) * trained + peak)
    if share > 1:  # whole are the layer at work, the next one, embeddings and output layer; gradients of one layer
        whole = counts.numbers - (counts.layers - 2) * counts.of_layer
        workspace += whole * product + 4 * counts.of_layer * full
    return Plan(
        way=way,
        traced=counts.traced,
        program=PROGRAM[way.device],
        weights=frozen / share + 4 * trained,
        gradients=4 * trained,
        optimizer=states * trained,
        activations=counts.activations,
        logits=counts.logits,
        workspace=workspace,
        result=counts.stored if full else 4 * counts.trained,
        checkpoint=(4 + states) * counts.trained,
        numbers=counts.numbers,
    )
