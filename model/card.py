"""The model card, README.md beside what is saved: on the hub it is the model's page, and its head is searched by.

Nothing stands in it that was not measured or written down: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, List

from common.support.exit import without_secrets
from common.support.model_dir import is_hub_id, read_origin

CARD = "README.md"
OURS = "<!-- written by the script that saved the model -->"
CHAT = """\
messages = [{"role": "user", "content": "..."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
"""
TEXT = """\
inputs = tokenizer("...", return_tensors="pt")
"""
LOAD = """\
from NEEDED import LOADER
from transformers import AutoTokenizer

path = PLACE  # this directory, or its name on the hub
model = LOADER.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
ASKED
output = model.generate(**inputs, max_new_tokens=256, do_sample=False, eos_token_id=END)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
FORM = """
The chat template writes the form of the training's prompts: chat clients ask as the model has learned.
"""
BASE_OF_ADAPTER = """
`base_model_name_or_path` in `adapter_config.json` says where the base is: on another machine write its directory, or
its name on the hub, there.
"""


def write_card(directory: Path, save_dir: str, made_of: dict, run: dict, adapter: bool, ask: dict) -> None:
    """Write the card of what `directory` holds, and `save_dir` will: of `run` (run.json, {}: not known), `made_of`
    (base_models), whether it is an adapter; ask: {"chat": by its chat template, "end": id that ends an answer}.

    Another README.md that is in `save_dir`, the reader's own, stays.
    """
    from huggingface_hub import ModelCard, ModelCardData  # here, because no training waits for it

    there = Path(save_dir) / CARD
    if there.is_file() and OURS not in there.read_text(encoding="utf-8", errors="replace"):
        print(f"{there} is your own and stays: no model card is written.")
        return
    base, meta = read_origin(made_of["base"]), run.get("dataset", {})
    source = str(meta.get("dataset", "")).partition(" at ")[0]
    data = ModelCardData(
        base_model=base.get("name"),
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        datasets=[source] if is_hub_id(source) and " at " in meta["dataset"] else None,
        language=meta.get("card", {}).get("language"),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["lora"] if run.get("options", {}).get("use_lora") or adapter else None,
    )
    name = Path(save_dir).resolve().name
    rows = {what: " ".join(str(value).split()).replace("|", r"\|") for what, value in _facts(made_of, run).items()}
    table = ["| | |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows.items())]
    code = LOAD.replace("NEEDED", "peft" if adapter else "transformers").replace("END", str(ask["end"]))
    code = code.replace("LOADER", "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM")
    code = code.replace("ASKED\n", CHAT if ask["chat"] else TEXT).replace("PLACE", json.dumps(name, ensure_ascii=False))
    form = FORM * (ask["chat"] and meta.get("template") != "chat")
    use = f"```python\n{code}```\n{form}{BASE_OF_ADAPTER * adapter}"
    body = [OURS, f"# {name}", "\n".join(table), "## Use", use]
    text = without_secrets(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body))
    ModelCard(text).save(directory / CARD)


def _facts(made_of: dict, run: dict) -> Dict[str, str]:
    """The rows of the table, of what is known."""
    options, meta, losses = run.get("options", {}), run.get("dataset", {}), run.get("held_out_loss", {})
    rows = {"Base model": _named(made_of["base"])} if made_of["base"] else {}
    if made_of.get("adapter"):
        how = "merged into it" if made_of.get("merged") else "trained further"
        rows["Adapter"] = f"{_named(made_of['adapter'])}, {how}"
    if meta.get("dataset"):
        rows["Data"] = _data(meta)
    if options:
        rows["Method"] = _method(options, made_of)
        rows["Training"] = _training(options, run)
    if losses:
        rows["Held-out loss"] = f"{losses['before']:.4f} before, {losses['after']:.4f} after, of {losses['rows']} rows"
    versions = [f"{package} {run[package]}" for package in ("torch", "transformers", "python") if run.get(package)]
    if versions:
        rows["Made with"] = ", ".join([str(run.get("device", ""))] * bool(run.get("device")) + versions)
    if run.get("commit"):
        rows["Commit of the training scripts"] = run["commit"]
    return rows


def _named(model: str) -> str:
    """By its name on the hub, or that of its directory: where that lies is the reader's own affair."""
    origin = read_origin(model)
    revision = f", {origin['revision']}" if origin.get("revision") else ""
    return f"{origin['name']}{revision}" if origin else f"`{Path(model).resolve().name}`"


def _data(meta: dict) -> str:
    name, _, revision = meta["dataset"].partition(" at ")
    if not revision and ("/" in name or Path(name).exists()):
        name = f"`{Path(name).name}`"
    counts, card = meta.get("counts", {}), meta.get("card", {})
    parts = [f"{name} at {revision}" if revision else name]
    parts += [f"{counts[split]['rows']} rows ({split})" for split in ("train", "validation") if split in counts]
    parts += [f"template {meta['template']}"] if meta.get("template") else []
    parts += [f"licence {card['license']}"] if card.get("license") else []
    return ", ".join(parts)


def _method(options: dict, made_of: dict) -> str:
    if not options.get("use_lora"):
        return "every weight"
    names = ", ".join(options["lora_target_modules"])
    bits = f", base in {options['bits']} bit" if options.get("bits") else ""
    return (
        f"LoRA, r {options['lora_r']}, alpha {options['lora_alpha']:g}, dropout {options['lora_dropout']}, "
        f"beside {names}{bits}"
    )


def _training(options: dict, run: dict) -> str:
    parts: List[str] = [f"{run['steps']} steps"] if run.get("steps") else []
    parts += [f"batches of {options['batch_size']} rows", f"rows of {options['block_size']} tokens at most"]
    parts += [f"learning rate {options['lr']} ({options['lr_scheduler']}, {options['warmup_steps']} steps of warm-up)"]
    parts += [f"weight decay {options['weight_decay']}", f"seed {options['seed']}"]
    return ", ".join(parts)
