"""The tutorials by the words of their pages, and the defaults of every script by the tables of reference.md."""

from __future__ import annotations

import re
from typing import NamedTuple

from tests.conftest import ROOT

ROWS, HELD_OUT_ROWS = 64, 16  # of each data set in dataset/samples


class Page(NamedTuple):
    """The words of one page, and what they must lead to."""

    packages: str
    download: str
    model_dir: str
    prepare: str
    sample: str
    dataset_file: str
    block_size: int
    train: str
    steps: int
    logged: tuple  # the steps that have a line
    save_dir: str
    log_interval: int
    larger: str  # the command on twice the accelerators
    batch_size: int  # its batch size
    inference: str
    frame: tuple  # what stands before and after the text of a question
    question: str  # the begin of the script's own
    template: str
    adapter: bool = False  # by default LoRA, else all weights
    bits: int = 0  # in which the base is


NEWS, CODE = "cnn_dailymail", "python_code_instructions_18k_alpaca"
SUMMARIZE = ("[SUMMARIZE] ", " [/SUMMARIZE]\n")
ALPACA = ("### Instruction:\n", "\n\n### Input:\n\n\n### Output:\n")
TOKEN = "--token hf_of_mine"
PAGES = {
    "llama2": Page(
        packages="requirements_llama2.txt",
        download=f"download_llama2_13b.py {TOKEN}",
        model_dir="./llama-2-13b-hf",
        prepare="prepare_llama2_dataset.py",
        sample=NEWS,
        dataset_file="./llama2_dataset.pt",
        block_size=1024,
        train="train_llama2.py",
        steps=1,
        logged=(1,),
        save_dir="./llama2_summarization",
        log_interval=2,
        larger="train_llama2.py --batch-size 512",
        batch_size=512,
        inference="inference_llama2.py",
        frame=SUMMARIZE,
        question="The harbour town of Velmora",
        template="summarization",
    ),
    "llama3-8b": Page(
        packages="requirements_llama3.txt",
        download=f"download_llama3_8b.py {TOKEN}",
        model_dir="./llama3-8b",
        prepare="prepare_llama3_dataset.py",
        sample=NEWS,
        dataset_file="./llama3_dataset.pt",
        block_size=1024,
        train="train_llama3.py",
        steps=1,
        logged=(1,),
        save_dir="./llama3_summarization",
        log_interval=2,
        larger="train_llama3.py --batch-size 512",
        batch_size=512,
        inference="inference_llama3.py",
        frame=SUMMARIZE,
        question="The harbour town of Velmora",
        template="summarization",
    ),
    "llama3-70b": Page(
        packages="requirements_llama3.txt",
        download=f"download_llama3_70b.py {TOKEN}",
        model_dir="./llama3-70b",
        prepare="prepare_llama3_dataset.py --model-name-or-path ./llama3-70b",
        sample=NEWS,
        dataset_file="./llama3_dataset.pt",
        block_size=1024,
        train="train_llama3_70b.py",
        steps=1,
        logged=(1,),
        save_dir="./llama3_70b_summarization",
        log_interval=10,
        larger="train_llama3_70b.py --batch-size 1024",
        batch_size=1024,
        inference="inference_llama3.py --model-name-or-path ./llama3_70b_summarization",
        frame=SUMMARIZE,
        question="The harbour town of Velmora",
        template="summarization",
    ),
    "mistral": Page(
        packages="requirements_mistral.txt",
        download=f"download_mistral_7b.py {TOKEN}",
        model_dir="./mistral-7b",
        prepare="prepare_mistral_dataset.py",
        sample=CODE,
        dataset_file="./mistral_dataset.pt",
        block_size=1024,
        train="train_mistral.py",
        steps=2,
        logged=(1, 2),
        save_dir="./mistral_code_generation",
        log_interval=1,
        larger="train_mistral.py",
        batch_size=256,
        inference="inference_mistral.py",
        frame=ALPACA,
        question="Write a function that returns the words",
        template="alpaca",
    ),
    "gpt": Page(
        packages="requirements_gpt.txt",
        download="download_gpt_13b.py",
        model_dir="./cerebras-gpt-13b",
        prepare="prepare_gpt_dataset.py",
        sample="Evol-Instruct-Python-26k",
        dataset_file="./gpt_dataset.pt",
        block_size=1024,
        train="train_gpt.py --max-train-steps 2",  # 8 without
        steps=2,
        logged=(2,),
        save_dir="./code_generation",
        log_interval=10,
        larger="train_gpt.py --batch-size 64",
        batch_size=64,
        inference="inference_gpt.py",
        frame=("[INST] ", " [/INST]\n"),
        question="Write a Python function that merges two sorted lists",
        template="instruction",
    ),
    "llama3.1": Page(
        packages="requirements_llama3_1.txt",
        download=f"download_llama3_1_8b.py {TOKEN}",
        model_dir="./llama3.1-8b",
        prepare="prepare_llama3_1_dataset.py",
        sample="korean_safe_conversation",
        dataset_file="./llama3_1_dataset.pt",
        block_size=2048,
        train="train_llama3_1.py --max-train-steps 8",  # 60 without
        steps=8,
        logged=(1, 2, 3, 4, 5, 6, 7, 8),
        save_dir="./llama3_1_korean",
        log_interval=1,
        larger="train_llama3_1.py",
        batch_size=8,
        inference="inference_llama3_1.py",
        frame=tuple(text.replace("I", "i").replace("O", "o") for text in ALPACA),
        question="비 오는 날 집에서",
        template="korean_alpaca",
        adapter=True,
        bits=4,
    ),
    "qwen3": Page(
        packages="requirements_qwen3.txt",
        download="download_qwen3.py",
        model_dir="./qwen3-4b",
        prepare="prepare_qwen3_dataset.py",
        sample="korean_conversations",
        dataset_file="./qwen3_dataset.pt",
        block_size=2048,
        train="train_qwen3.py --max-train-steps 8",  # 60 without
        steps=8,
        logged=(1, 2, 3, 4, 5, 6, 7, 8),
        save_dir="./qwen3_korean_chat",
        log_interval=1,
        larger="train_qwen3.py",
        batch_size=8,
        inference="inference_qwen3.py",
        frame=("user\n", "\nassistant\n"),
        question="비 오는 날 집에서",
        template="chat",
        adapter=True,
    ),
    "smollm2": Page(
        packages="requirements_smollm2.txt",
        download="download_smollm2.py",
        model_dir="./smollm2-135m",
        prepare="prepare_smollm2_dataset.py",
        sample=CODE,
        dataset_file="./smollm2_dataset.pt",
        block_size=512,
        train="train_smollm2.py",
        steps=4,
        logged=(1, 2, 3, 4),
        save_dir="./smollm2_korean_numbers",
        log_interval=1,
        larger="train_smollm2.py",
        batch_size=16,
        inference="inference_smollm2.py",
        frame=("### Instruction:\n", "\n\n### Output:\n"),
        question="3번 출구에서",
        template="short_alpaca",
    ),
}


def page_tables(page):
    """The tables of a page, each a list of rows, {heading: cell}."""
    text = (ROOT / page).read_text(encoding="utf-8")
    tables = []
    for block in re.findall(r"(?m)(?:^\|.*\n)+", text):
        heading, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        tables.append([dict(zip(heading, row)) for row in rows])
    return tables


def page_defaults():
    """{script: {option: default}} of all that reference.md's tables of scripts, models and defaults say."""
    tables = page_tables("tutorial/reference.md")
    scripts, models, defaults = (
        next(table for table in tables if heading in table[0])
        for heading in ("`tutorial/download_*`", "허브 id", "학습률, 스케줄")
    )
    assert len(scripts) == len(models) == len(defaults) == len(PAGES)
    found = {}
    for row, model, told in zip(scripts, models, defaults):
        assert row["튜토리얼"] == model["튜토리얼"] == told["튜토리얼"]  # all three name them in one order
        (download,), (prepare,), (train, inference) = (
            re.findall("`([^`]+)`", row[heading])
            for heading in ("`tutorial/download_*`", "`dataset/prepare_*`", "`tutorial/train_*`, `inference_*`")
        )
        quoted = re.search("`([^`]+)`", model["허브 id"])
        found[f"tutorial/{download}"] = {"model-name": quoted.group(1) if quoted else model["허브 id"]}
        data = {"dataset-name-or-path": model["데이터"].split()[0], "block-size": int(told["최대 길이"])}
        found[f"dataset/{prepare}"] = data
        lr, schedule, *warmup = told["학습률, 스케줄"].split(", ")
        amount, unit = told["학습량"].split()
        lora = told["방법"] in ("LoRA", "QLoRA")
        found[f"tutorial/{train}"] = {
            "batch-size": int(told["배치"]),
            "block-size": int(told["최대 길이"]),
            "lr with --use-lora" if lora else "lr": float(lr),
            "lr-scheduler": schedule,
            "warmup-steps": int(warmup[0].split()[1]) if warmup else 0,
            "max-train-steps": amount if unit == "step" else "by the epochs",
            "epochs": int(amount) if unit == "epoch" else 1,
            "use-lora": str(lora),
            "load-in": "4 bit" if told["방법"] == "QLoRA" else "as it is stored",
        }
        found.setdefault(f"tutorial/{inference}", {})
    return found


def all_defaults():
    """The page's, and what its tables leave out: places (they are the same from one command to the next), LoRA."""
    found = page_defaults()
    for page in PAGES.values():
        download, prepare, train, inference = (
            found[f"{folder}/{words.split()[0]}"]
            for folder, words in (
                ("tutorial", page.download),
                ("dataset", page.prepare),
                ("tutorial", page.train),
                ("tutorial", page.inference),
            )
        )
        model = {"model-name-or-path": page.model_dir}
        download["save-dir"] = page.model_dir
        for name, value in {**model, "save-path": page.dataset_file}.items():
            prepare.setdefault(name, value)  # Llama3's serves two, the smaller first
        assert train["block-size"] == page.block_size
        data = {"dataset-name-or-path": page.dataset_file}
        train.update({**model, **data, "save-dir": page.save_dir, "log-interval": page.log_interval, **LORA})
        train["gradient-checkpointing"] = "auto"
        train["seed"] = 3407 if page.adapter else 0
        train.setdefault("lr", 2e-5)  # of Llama 3.1 and Qwen3, with --no-use-lora
        inference.setdefault("model-name-or-path", page.save_dir)
    return {**found, **OTHERS}


LORA = {
    "lr with --use-lora": 2e-4,
    "lora-r": 16,
    "lora-alpha": 16,
    "lora-dropout": 0.0,
    "lora-target-modules": "['all-linear']",
    "weight-decay": 0.01,
    "deterministic": "True",
}
OTHERS = {
    "tutorial/merge_adapter.py": {"model-name-or-path": "./llama3_1_korean", "save-dir": "./llama3_1_korean_merged"},
    "tutorial/compare_adapter.py": {
        "model-name-or-path": "./llama3_1_korean",
        "dataset-name-or-path": "./llama3_1_dataset.pt",
        "rows": 3,
    },
    "tutorial/evaluate.py": {"model-name-or-path": "./smollm2_korean_numbers", "rows": 64, "max-new-tokens": 256},
    "tutorial/web_demo.py": {"model-name-or-path": "./smollm2_korean_numbers"},
    "tutorial/check_accelerator.py": {},
}
DEFAULTS = all_defaults()
