"""The figures of memory and disk in the README and the pages, printed from the plan (model/memory_plan.py).

    python tests/plan_tables.py            print each place of a page that differs from the plan
    python tests/plan_tables.py --write    write them into the pages

A page says by a marker what stands there, up to the next `<!-- /plan -->`:

    <!-- plan: memory llama2 -->           the table of one model's memory; of all models without a name
    <!-- plan: disk -->                    the table of the disk of all models
    <!-- plan: scale llama3_70b -->        the table of one model on several nodes: memory, what moves, seconds
    <!-- plan: llama2 full peak -->        one figure: a part of PARTS by a method of METHODS. `full 8`: on 8 GPUs

On one GPU, micro-batches of 4096 tokens; SmolLM2 on a CPU, micro-batches of 1024 tokens. tests/test_pages.py compares.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Dict, List, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from model.memory_plan import USABLE_FRACTION, MemoryPlan, TrainingSetup, predict
from model.tutorials import TUTORIALS, Machine, least_memory, shape_of

KINDS = {tutorial.kind: tutorial for tutorial in TUTORIALS}
METHODS = {"full": "전체 파라미터", "lora": "LoRA", "lora_4bit": "QLoRA"}
MARKED = re.compile(r"(<!-- plan: ([\w ]+?) -->)(.*?)(<!-- /plan -->)", re.DOTALL)
# of a plan without and one with gradient checkpointing
PARTS = {
    "state": lambda off, on: off.state - off.program,  # weights, gradients, optimizer
    "weights": lambda off, on: off.weights,
    "off": lambda off, on: off.peak,
    "peak": lambda off, on: on.peak,
    "between": lambda off, on: between(on),
    "result": lambda off, on: off.result,
    "checkpoint": lambda off, on: off.checkpoint,
}

# Of `plan: scale`. The rates are the highest that the hardware can reach; that of the disk is assumed.
STEP_TOKENS = 512 * 1024  # --batch-size and --block-size of train_llama3_70b.py
NVLINK = 450e9  # bytes a second that an H100 receives; it sends as many
NETWORK = 100e9 / 8  # bytes a second that a node receives, by one link of 100 Gb/s
PRODUCTS = 989e12  # operations a second of an H100, in bf16
DISK = 2e9  # bytes a second that a node writes


@lru_cache(maxsize=None)
def plans(kind: str, method: str, gpus: int = 1) -> Tuple[MemoryPlan, MemoryPlan]:
    """Without gradient checkpointing, and with it."""
    tokens, device = (1024, "cpu") if kind == "smollm2" else (4096, "cuda")
    setup = TrainingSetup(method, False, tokens, torch.bfloat16, device, gpus)
    off, on = (predict(shape_of(KINDS[kind]), setup._replace(checkpointing=switch)) for switch in (False, True))
    return off, on


def between(planned: MemoryPlan) -> float:
    """Bytes of a micro-batch, whatever they are for."""
    return planned.activations + planned.logits + planned.workspace


def gb(size: float) -> str:
    size /= 1e9
    return f"{size:,.0f}" if size >= 100 else f"{size:.1f}" if size >= 1 else f"{size:.2f}"


def table(head: List[str], rows: List[List[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def memory(kind: str) -> str:
    """Of one model, a row a method, and those of 8 GPUs."""
    rows = []
    ways = [(method, 1) for method in METHODS] + ([("full", 8), ("lora", 8)] if kind != "smollm2" else [])
    for method, gpus in ways:
        off, on = plans(kind, method, gpus)
        state = [gb(part) for part in (off.weights, off.gradients, off.optimizer)]
        pairs = [f"{gb(between(off))} / {gb(between(on))}", f"{gb(off.peak)} / {gb(on.peak)}"]
        rows.append([METHODS[method] + (f", GPU {gpus}장" if gpus > 1 else ""), *state, *pairs])
    return table(["GB (8장은 GPU마다)", "가중치", "gradient", "AdamW", "activation 등", "최대"], rows)


def name_of(kind: str) -> str:
    return KINDS[kind].name.replace("Llama2", "Llama 2").replace("Llama3", "Llama 3").split(",")[0]


def memory_of_all() -> str:
    rows = []
    for kind in KINDS:
        off, _ = plans(kind, "full")
        peaks = [[gb(of.peak) for of in plans(kind, method)] for method in METHODS]
        shared = gb(plans(kind, "full", 8)[1].peak) if kind != "smollm2" else "-"
        name = name_of(kind) + " (CPU)" * (kind == "smollm2")
        rows.append([name, gb(off.state - off.program), *map(" / ".join, peaks), shared])
    head = ["GB", "전체: 가중치, gradient, AdamW", "전체, 최대", "LoRA, 최대", "QLoRA, 최대"]
    return table([*head, "전체를 GPU 8장에, 한 장의 최대"], rows)


def disk_of_all() -> str:
    rows = []
    for kind in KINDS:
        full, lora, four = (plans(kind, method)[0] for method in METHODS)
        checkpoints = [gb(planned.checkpoint) for planned in (full, lora, four)]
        rows.append([name_of(kind), gb(full.result), gb(full.result), gb(lora.result), " / ".join(checkpoints)])
    head = ["GB", "모델", "결과", "LoRA의 결과", "체크포인트 하나: 전체 / LoRA / QLoRA"]
    return table(head, rows)


def scale(kind: str) -> str:
    columns = {gpus: on_nodes(kind, gpus) for gpus in (8, 16, 32)}
    rows = [[name, *(column[name] for column in columns.values())] for name in columns[8]]
    return table(["GB, 초", *(f"노드 {gpus // 8}개, GPU {gpus}장" for gpus in columns)], rows)


def on_nodes(kind: str, gpus: int) -> Dict[str, str]:
    """A column of `scale`, by its rows: on nodes of 8 GPUs, with gradient checkpointing."""
    weights = shape_of(KINDS[kind]).num_parameters
    full = plans(kind, "full", gpus)[1]
    # The plan of LoRA on several GPUs differs from that on one by the gathered weights alone.
    gathered = plans(kind, "lora", gpus)[1].workspace - plans(kind, "lora")[1].workspace
    parts = (full.activations + full.logits, gathered, full.workspace - gathered + full.program)
    cells = {
        "전체 파라미터: 가중치 / gradient / AdamW": " / ".join(map(gb, (full.weights, full.gradients, full.optimizer))),
        "전체 파라미터: activation, logits / 모은 가중치 / 그 밖": " / ".join(map(gb, parts)),
    }
    for method, name in METHODS.items():
        planned = plans(kind, method, gpus)[1]
        least = least_memory(KINDS[kind], method, Machine("CUDA", 80e9, torch.bfloat16, gpus))
        cells[f"{name}: 최대"] = f"{gb(planned.peak)} ({'가능' if least <= USABLE_FRACTION * 80e9 else '부족'})"
        size = received(method, gpus, STEP_TOKENS / planned.setup.tokens / gpus, weights, planned.gradients / 4)
        times = [seconds(size / NVLINK), seconds(size / NETWORK) if gpus > 8 else "-"]
        cells[f"{name}: 한 step에 받는 양 / NVLink / 100 Gb/s"] = " / ".join([gb(size), *times])
    # 2 operations a weight and token in the forward pass, 2 when a layer is computed again, 4 in the backward pass.
    cells["전체 파라미터: 한 step의 계산"] = seconds(8 * weights * STEP_TOKENS / (PRODUCTS * gpus))
    cells[f"전체 파라미터: 체크포인트 {gb(full.checkpoint)} GB 쓰기"] = seconds(full.checkpoint / (DISK * gpus / 8))
    return cells


def seconds(time: float) -> str:
    return f"{gb(1e9 * time)}초" if time >= 0.01 else "0.01초 미만"


def received(method: str, gpus: int, micro_batches: float, weights: float, adapter: float) -> float:
    """Bytes that each GPU receives from the others in a step. weights, adapter: numbers of parameters.

    In each micro-batch FSDP2 (model/fsdp.py) gathers all weights in 16 bit, for the forward and again for the backward
    pass, and adds their gradients up in float32; those of an adapter are added up once a step. In a ring of n GPUs each
    receives (n - 1) / n of that, and twice where each needs the whole sum (NVIDIA/nccl-tests, doc/PERFORMANCE.md).
    """
    in_micro_batch = {"full": 2 + 2 + 4, "lora": 2 + 2, "lora_4bit": 0}[method] * weights
    in_step = 0 if method == "full" else 2 * 4 * adapter
    return (gpus - 1) / gpus * (micro_batches * in_micro_batch + in_step)


def printed(words: str) -> str:
    """What stands behind a marker with these words."""
    what, *rest = words.split()
    if what == "disk":
        return f"\n\n{disk_of_all()}\n"
    if what == "memory":
        return f"\n\n{memory(*rest) if rest else memory_of_all()}\n"
    if what == "scale":
        return f"\n\n{scale(*rest)}\n"
    method, part = rest[0], rest[-1]
    gpus = int(rest[1]) if len(rest) == 3 else 1
    return f"{gb(PARTS[part](*plans(what, method, gpus)))} GB"


def with_figures(text: str) -> str:
    """A page with what the plan says at each marker."""
    return MARKED.sub(lambda found: found.group(1) + printed(found.group(2)) + found.group(4), text)


def pages() -> List[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "tutorial").glob("*.md"))]


def differences() -> List[str]:
    """A line for each place of a page where something else stands."""
    found = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for place in MARKED.finditer(text):
            if place.group(3) != printed(place.group(2)):
                line = text[: place.start()].count("\n") + 1
                found.append(f"{page.relative_to(ROOT)}:{line}: plan: {place.group(2)}:{printed(place.group(2))}")
    return found


def main() -> None:
    different = differences()
    print("\n".join(different) or "The pages have the figures of the plan.")
    if sys.argv[1:] == ["--write"]:
        for page in pages():
            page.write_text(with_figures(page.read_text(encoding="utf-8")), encoding="utf-8")
    elif different:
        sys.exit("error: these places differ; python tests/plan_tables.py --write writes them")


if __name__ == "__main__":
    main()
