"""The figures of memory and disk in the README and the pages, printed from the plan (model/memory_plan.py).

    python tests/plan_tables.py            print each place of a page that differs from the plan
    python tests/plan_tables.py --write    write them into the pages

A page says by a marker what stands there, up to the next `<!-- /plan -->`:

    <!-- plan: memory llama2 -->           the table of one model's memory; of all models without a name
    <!-- plan: disk -->                    the table of the disk of all models
    <!-- plan: llama2 full peak -->        one figure: a part of PARTS by a method of METHODS. `full 8`: on 8 GPUs

On one GPU, micro-batches of 4096 tokens; SmolLM2 on a CPU, micro-batches of 1024 tokens. tests/test_pages.py compares.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import List, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from model.memory_plan import MemoryPlan, TrainingSetup, predict
from model.tutorials import TUTORIALS, shape_of

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


def printed(words: str) -> str:
    """What stands behind a marker with these words."""
    what, *rest = words.split()
    if what == "disk":
        return f"\n\n{disk_of_all()}\n"
    if what == "memory":
        return f"\n\n{memory(*rest) if rest else memory_of_all()}\n"
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
