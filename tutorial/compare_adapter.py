"""Ask the base and the adapter the same questions, of held-out rows, and print the answers side by side.

python tutorial/compare_adapter.py
python tutorial/compare_adapter.py --model-name-or-path ./my_adapter --dataset-name-or-path ./my_dataset.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common import UserError
from common.accelerator import start_accelerator
from common.arguments import compare_arguments
from common.dataset_cache import load_dataset
from common.download import require_adapter
from common.tokenization import load_tokenizer
from model.generation import answer_all, prompt_room
from model.loading import load_model


def main():
    args = compare_arguments(
        __doc__, model_name_or_path="./llama3_1_korean", dataset_name_or_path="./llama3_1_dataset.pt"
    )
    require_adapter(args.model_name_or_path)
    accelerator = start_accelerator(seed=0)
    tokenizer = load_tokenizer(args.model_name_or_path)
    rows = load_dataset(args.dataset_name_or_path, tokenizer)["validation"]
    if not len(rows["answer_starts"]):
        raise UserError(f"{args.dataset_name_or_path} has no held-out rows. Prepare it from 20 rows or more.")
    model = load_model(args.model_name_or_path, accelerator.device, accelerator.dtype, args.bits)

    room, prompts, references = prompt_room(model, args.max_new_tokens), [], []
    for row in range(min(args.rows, len(rows["answer_starts"]))):
        ids = rows["input_ids"][rows["offsets"][row] : rows["offsets"][row + 1]].tolist()
        start = int(rows["answer_starts"][row])
        prompts.append(ids[:start][:room])
        references.append(ids[start:])
    after = answer_all(model, tokenizer, prompts, args.max_new_tokens)
    with model.disable_adapter():  # the same weights, asked without what was learned
        before = answer_all(model, tokenizer, prompts, args.max_new_tokens)

    for question, *answers, reference in zip(prompts, before, after, references):
        question, reference = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (question, reference))
        if len(question) > 600:  # an article
            question = question[:300] + " ... " + question[-300:]
        table = Table(title=Text(question), title_justify="left")
        for heading in ("Base", "Adapter", "Answer in the data"):
            table.add_column(heading, ratio=1, overflow="fold")
        table.add_row(*map(Text, (*answers, reference)))  # as Text, because rich reads [INST] as its markup
        Console().print(table)


if __name__ == "__main__":
    main()
