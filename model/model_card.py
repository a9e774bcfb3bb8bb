"""The model card: README.md next to a saved model, which the hub shows as the model's page.

It contains only what was measured or recorded. Source: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, List

from common.support.exit import without_secrets
from common.support.model_dir import is_hub_id, read_origin

CARD = "README.md"
OURS = "<!-- written by the script that saved the model -->"
TEMPLATE = """\
{ours}

# {name}

| | |
| --- | --- |
{table}

## Use

```python
from {library} import {auto_class}
from transformers import AutoTokenizer

path = {path}  # this directory, or its name on the hub
model = {auto_class}.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
{inputs}
output = model.generate(**inputs, max_new_tokens=256, do_sample=False, eos_token_id={ends})
answer = output[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False))
```
{notes}"""
CHAT_INPUTS = """\
messages = [{"role": "user", "content": "..."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
TEXT_INPUTS = 'inputs = tokenizer("...", return_tensors="pt")'
PROMPT_NOTE = "\nThe chat template writes the prompts as they were in the training.\n"
ADAPTER_NOTE = """
`base_model_name_or_path` in `adapter_config.json` says where the base model is. On another machine, write its directory
there, or its name on the hub. The adapter is for the class {adapter_for}.
"""


def write_card(
    directory: Path, save_dir: str, made_of: dict, run: dict, adapter_for: str, has_chat_template: bool, ends: List[int]
) -> None:
    """Write the card of a model into `directory`, whose files will be moved to `save_dir`.

    made_of: its base_models; run: its run.json, {} if it is not known; adapter_for: the class of an adapter's base
    model, "" of a whole model; ends: the tokens that end an answer. A README.md in `save_dir` that the user has written
    stays.
    """
    from huggingface_hub import ModelCard, ModelCardData  # not at the top: no training waits for this import

    is_adapter = bool(adapter_for)
    existing = Path(save_dir) / CARD
    if existing.is_file() and OURS not in existing.read_text(encoding="utf-8", errors="replace"):
        print(f"{existing} is your own and stays: no model card is written.")
        return
    meta = run.get("dataset", {})
    base = read_origin(made_of["base"])
    dataset, _, revision = str(meta.get("dataset", "")).partition(" at ")
    relation = "adapter" if is_adapter else "finetune"
    data = ModelCardData(
        base_model=base.get("name"),
        base_model_relation=relation if base else None,
        datasets=[dataset] if revision and is_hub_id(dataset) else None,
        language=meta.get("card", {}).get("language"),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["lora"] if is_adapter or run.get("options", {}).get("use_lora") else None,
    )
    lines = []
    for title, value in table_rows(made_of, run).items():
        cell = " ".join(value.split()).replace("|", r"\|")
        lines.append(f"| {title} | {cell} |")
    notes = ""
    if has_chat_template and meta.get("template") != "chat":
        notes += PROMPT_NOTE
    if is_adapter:
        notes += ADAPTER_NOTE.format(adapter_for=adapter_for)
    name = Path(save_dir).resolve().name
    body = TEMPLATE.format(
        ours=OURS,
        name=name,
        table="\n".join(lines),
        library="peft" if is_adapter else "transformers",
        auto_class="AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM",
        path=json.dumps(name, ensure_ascii=False),
        inputs=CHAT_INPUTS if has_chat_template else TEXT_INPUTS,
        ends=ends if len(ends) > 1 else ends[0],
        notes=notes,
    )
    ModelCard(without_secrets(f"---\n{data.to_yaml()}\n---\n\n{body}")).save(directory / CARD)


def table_rows(made_of: dict, run: dict) -> Dict[str, str]:
    """{title: value} of what is known."""
    rows = {}
    if made_of["base"]:
        rows["Base model"] = _model_name(made_of["base"])
    if made_of.get("adapter"):
        how = "merged into it" if made_of.get("merged") else "trained further"
        rows["Adapter"] = f"{_model_name(made_of['adapter'])}, {how}"
    if not run:
        return rows
    options = run["options"]
    rows["Data"] = _data(run["dataset"])
    rows["Method"] = "full fine-tuning"
    if options["use_lora"]:
        rows["Method"] = (
            f"LoRA, r {options['lora_r']}, alpha {options['lora_alpha']:g}, dropout {options['lora_dropout']}, "
            f"on {', '.join(options['lora_target_modules'])}"
        )
        if options["bits"]:
            rows["Method"] += f", base model in {options['bits']} bit"
    rows["Training"] = (
        f"{run['steps']} steps, batches of {options['batch_size']} rows, at most {options['block_size']} tokens a row, "
        f"learning rate {options['lr']} ({options['lr_scheduler']}, {options['warmup_steps']} warm-up steps), "
        f"weight decay {options['weight_decay']}, seed {options['seed']}"
    )
    loss = run.get("held_out_loss")
    if loss:
        rows["Held-out loss"] = f"{loss['before']:.4f} before, {loss['after']:.4f} after, of {loss['rows']} rows"
    versions = ", ".join(f"{package} {run[package]}" for package in ("torch", "transformers", "python"))
    rows["Made with"] = f"{run['device']}, {versions}"
    if run["commit"]:
        rows["Commit of the training scripts"] = run["commit"]
    return rows


def _model_name(model: str) -> str:
    """Its name on the hub, or that of its directory, without the place where the user keeps it."""
    origin = read_origin(model)
    if not origin:
        return f"`{Path(model).resolve().name}`"
    return f"{origin['name']}, {origin['revision']}" if origin.get("revision") else origin["name"]


def _data(meta: dict) -> str:
    name, _, revision = meta["dataset"].partition(" at ")
    if revision:
        name = meta["dataset"]
    elif "/" in name or Path(name).exists():
        name = f"`{Path(name).name}`"
    parts = [name]
    for split, counts in meta["counts"].items():
        parts.append(f"{counts['rows']} rows ({split})")
    parts.append(f"template {meta['template']}")
    if meta.get("card", {}).get("license"):
        parts.append(f"licence {meta['card']['license']}")
    return ", ".join(parts)
