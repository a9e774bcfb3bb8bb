"""Ask the base and the adapter the same questions, of held-out rows, and print the answers side by side.

python tutorial/compare_adapter.py
python tutorial/compare_adapter.py --model-name-or-path ./my_adapter --dataset-name-or-path ./my_dataset.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common import less_memory
from common.dataset_cache import ends_of, held_out_questions, load_dataset
from common.model_directory import require_adapter
from common.parser import COUNT, Parser, add_bits
from common.tables import print_answers
from common.tokenization import load_tokenizer


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model-name-or-path", default="./llama3_1_korean", help="directory of the adapter")
    add("--dataset-name-or-path", default="./llama3_1_dataset.pt", help="dataset file with the held-out rows")
    add("--rows", type=COUNT, default=3, help="held-out rows whose questions are asked")
    add("--max-new-tokens", type=COUNT, default=64, help="tokens of an answer at most")
    add_bits(parser, "load the base in 4 bit")
    args = parser.parse_args()
    less_memory.extend(["--load-in-4bit"] * (args.bits != 4) + ["--rows", "--max-new-tokens"])
    require_adapter(args.model_name_or_path)

    # imported below the arguments, so that --help and a mistyped option are answered at once
    from common.accelerator import start_accelerator
    from model.generation import answer_ids, prompt_room
    from model.loading import load_model

    accelerator = start_accelerator(seed=0)
    tokenizer = load_tokenizer(args.model_name_or_path)
    dataset = load_dataset(args.dataset_name_or_path, tokenizer)
    questions = held_out_questions(dataset, args.dataset_name_or_path, tokenizer, args.rows)
    model = load_model(args.model_name_or_path, accelerator.device, accelerator.dtype, args.bits)

    ends = ends_of(dataset["meta"], tokenizer)
    room = prompt_room(model, args.max_new_tokens)
    prompts = [prompt[:room] for prompt, _ in questions]
    after = answer_ids(model, tokenizer, prompts, args.max_new_tokens, ends)
    with model.disable_adapter():  # the same weights, asked without what was learned
        before = answer_ids(model, tokenizer, prompts, args.max_new_tokens, ends)

    for (_, reference), *ids in zip(questions, prompts, before, after):
        question, base, adapter = (tokenizer.decode(text, skip_special_tokens=True).strip() for text in ids)
        print_answers(question, {"Base": base, "Adapter": adapter, "Answer in the data": reference})


if __name__ == "__main__":
    main()
