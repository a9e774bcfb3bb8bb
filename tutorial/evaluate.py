"""Measure a model on held-out rows, before and after its training: a table, and a picture beside the trained model.

python tutorial/evaluate.py
python tutorial/evaluate.py --model-name-or-path ./llama2_summarization --rows 256 --batch-rows 32
python tutorial/evaluate.py --model-name-or-path ./my_model --base-model-name-or-path ./my_base \
    --dataset-name-or-path ./my_dataset.pt

Base and dataset file are those that the training's run.json names, where they are not given. The rows are the first of
the held-out ones, as for the training's held-out loss. What is measured goes by the template of the dataset file:

all        perplexity: exp of the mean loss of an answer token. Only models of one tokenizer can be compared by it.
summaries  ROUGE-1, -2 and -L, F1 (Lin 2004, https://aclanthology.org/W04-1013/), words stemmed, for English only.
           ROUGE-L takes the whole summary as one sequence; papers often print ROUGE-Lsum, by sentence, which is higher.
code       parses: it is Python (where the answer has a fenced block: what that holds) and not empty.
           defines what was asked: where the data's answer defines functions or classes at its top level, so does this
           one; those that the prompt names by their names, else one of the same kind. Rows without any don't count.
           No code is run: what parses may still be wrong.
others     chrF2 of the letters (Popovic 2015, https://aclanthology.org/W15-3049/), of any language and any template:
           conversations, Korean, your own. It says how much of the data's words an answer has, not whether it is right.

Answers are greedy; those are also counted that end by themselves. A share p of n rows is known to about
2 * sqrt(p * (1 - p) / n), of 64 rows to 12 points. The first answers are shown side by side, all of them go to
evaluation.json: read them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import Parser, add_bits, non_negative_int, positive_int
from common.support.exit import UserError, run
from common.support.files import atomic_write, require_writable
from common.support.model_dir import ModelSource, require_model


def arguments():
    """The options; base and dataset file, where they are not given, as the training had them."""
    parser = Parser(__doc__)
    add = parser.add_argument
    model = "directory of the trained model or adapter"
    add("--model-name-or-path", default="./smollm2_code_generation", help=model)
    add("--base-model-name-or-path", help="the model before the training (default: as run.json beside the model says)")
    add("--dataset-name-or-path", help="dataset file with the held-out rows (default: as run.json says)")
    add("--save-dir", help="directory for evaluation.json and evaluation.png (default: that of the model)")
    add("--rows", type=positive_int, default=64, help="held-out rows to use at most")
    add("--batch-rows", type=positive_int, default=8, help="questions asked at once, fewer need less memory")
    add("--max-new-tokens", type=positive_int, default=256, help="tokens of an answer at most")
    add("--show", type=non_negative_int, default=2, help="rows whose answers are printed side by side")
    add_bits(parser, "load the models, or the adapter's base, in 4 bit")
    args = parser.parse_args()
    model_dir = args.model_name_or_path
    require_model(model_dir)
    source = ModelSource(model_dir)
    trained = source.run.get("options", {})
    base = source.base if source.is_adapter else trained.get("model_name_or_path")
    args.base_model_name_or_path = args.base_model_name_or_path or base
    args.dataset_name_or_path = args.dataset_name_or_path or trained.get("dataset_name_or_path")
    for option in ("--base-model-name-or-path", "--dataset-name-or-path"):
        if not getattr(args, option[2:].replace("-", "_")):
            raise UserError(f"{model_dir} has no run.json that tells how it was trained: give {option}.")
    require_model(args.base_model_name_or_path, "give the model before the training with --base-model-name-or-path")
    args.save_dir = args.save_dir or (model_dir if Path(model_dir).is_dir() else ".")
    require_writable(args.save_dir, "--save-dir")
    return args


def main():
    args = arguments()

    # Imported here, so that --help and a mistyped option are answered at once.
    from common.batches import Batches
    from common.dataset_file import held_out_prompts, load_dataset, stop_token_ids
    from common.device import start_device
    from common.tokenization import fingerprint, load_tokenizer
    from common.train_log import print_answers, with_progress
    from dataset.scores import compare_scores, draw_table, measures_for, print_table
    from model.generate import generate_in_batches, perplexity
    from model.load import load_model

    device = start_device(seed=0)
    tokenizer = load_tokenizer(args.model_name_or_path)
    dataset = load_dataset(args.dataset_name_or_path, tokenizer)
    if fingerprint(load_tokenizer(args.base_model_name_or_path)) != dataset["meta"]["tokenizer"]:
        raise UserError(
            f"{args.base_model_name_or_path} has another tokenizer than {args.model_name_or_path}: it can't have been "
            "its base. Give the right one with --base-model-name-or-path."
        )
    questions = held_out_prompts(dataset, args.dataset_name_or_path, tokenizer, args.rows)
    prompts, references = [prompt for prompt, _ in questions], [reference for _, reference in questions]
    texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    measures = measures_for(dataset["meta"]["template"])
    for score in measures:
        score("", "", "")  # A missing package is reported before the work.
    ends = stop_token_ids(dataset["meta"], tokenizer)
    static_length = dataset["meta"]["block_size"] if device.static_shapes else 0
    batches = Batches(dataset["validation"], args.batch_rows, device.micro_batch_tokens, static_length)

    def load(directory):
        return load_model(directory, device.torch_device, device.dtype, args.bits)

    def measure(model, when):
        mean_perplexity = perplexity(model, batches, len(prompts), device)
        parts = with_progress(generate_in_batches(model, tokenizer, prompts, args, ends), len, when, len(prompts))
        return mean_perplexity, [(answer.text.strip(), answer.ended) for part in parts for answer in part]

    source = ModelSource(args.model_name_or_path)
    if source.is_adapter and source.base == args.base_model_name_or_path:
        model = load(args.model_name_or_path)
        with model.disable_adapter():  # the same weights, asked without what was learned
            before = measure(model, "before")
        after = measure(model, "after")
    else:  # one after the other: only one of the two is in memory
        before = measure(load(args.base_model_name_or_path), "before")
        after = measure(load(args.model_name_or_path), "after")

    table = compare_scores(measures, texts, references, before, after)
    report = {"command": sys.argv, "options": vars(args), "dataset": dataset["meta"], "device": device.name}
    report["measures"] = table
    report["answers"] = [
        {"prompt": prompt, "reference": reference, "before": old, "after": new, "ended": [old_ended, new_ended]}
        for prompt, reference, (old, old_ended), (new, new_ended) in zip(texts, references, before[1], after[1])
    ]
    save_dir = Path(args.save_dir)
    with atomic_write(save_dir / "evaluation.json") as new:
        new.write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    draw_table(table, save_dir / "evaluation.png")
    # Saved before it is printed: `| head` may have closed the output.
    print(f"{args.model_name_or_path}, held-out rows of {args.dataset_name_or_path}:")
    print_table(table)
    for score in measures:
        print(" ".join(score.__doc__.split()))  # what it measures
    for row in report["answers"][: args.show]:
        shown = {"Before": row["before"], "After": row["after"], "Answer in the data": row["reference"]}
        print_answers(row["prompt"].strip(), shown)
    print(f"Saved in {args.save_dir}: evaluation.json, evaluation.png")


if __name__ == "__main__":
    run(main)
