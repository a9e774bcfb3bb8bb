"""Ask the base and the adapter the same questions, of held-out rows, and print the answers side by side.

python tutorial/compare_adapter.py
python tutorial/compare_adapter.py --model-name-or-path ./my_adapter --dataset-name-or-path ./my_dataset.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import Parser, add_bits, positive_int
from common.support.exit import run
from common.support.model_dir import ModelSource, require_adapter


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model-name-or-path", default="./llama3_1_korean", help="directory of the adapter")
    add("--dataset-name-or-path", default="./llama3_1_dataset.pt", help="dataset file with the held-out rows")
    add("--rows", type=positive_int, default=3, help="held-out rows whose questions are asked")
    add("--batch-rows", type=positive_int, default=8, help="questions asked at once, fewer need less memory")
    add("--max-new-tokens", type=positive_int, default=64, help="tokens of an answer at most")
    add_bits(parser, "load the base in 4 bit")
    args = parser.parse_args()
    require_adapter(args.model_name_or_path)

    # Imported here, so that --help and a mistyped option are answered at once.
    from common.dataset_file import held_out_prompts, load_dataset
    from common.device import start_device
    from common.tokenization import load_tokenizer
    from common.train_log import print_answers, with_progress
    from model.generate import generate_in_batches
    from model.load import load_model
    from model.lora import load_adapter

    device = start_device(seed=0)
    tokenizer = load_tokenizer(args.model_name_or_path)
    dataset = load_dataset(args.dataset_name_or_path, tokenizer)
    questions = held_out_prompts(dataset, args.dataset_name_or_path, tokenizer, args.rows)
    prompts = [prompt for prompt, _ in questions]
    source = ModelSource(args.model_name_or_path)
    if not source.has_not_seen(dataset["meta"]):
        print(f"The adapter may have learned these rows of {args.dataset_name_or_path} from another file.")

    def ask(model, name):
        parts = generate_in_batches(model, tokenizer, prompts, args, dataset["meta"]["end_tokens"])
        parts = with_progress(parts, lambda part: part.rows, name, len(prompts))
        return [answer.text.strip() for part in parts for answer in part.answers]

    # The base is asked by itself: with an adapter that is switched off it may be another model (bias, PiSSA).
    bits = source.base_bits if args.bits is None else args.bits
    model = load_model(source.base, device.torch_device, device.dtype, bits)
    before = ask(model, "base")
    after = ask(load_adapter(model, args.model_name_or_path), "adapter")

    for prompt, (_, reference), base, adapter in zip(prompts, questions, before, after):
        question = tokenizer.decode(prompt, skip_special_tokens=True).strip()
        answers = {"Base": base, "Adapter": adapter, "Answer in the data": reference}
        print_answers(question, answers)


if __name__ == "__main__":
    run(main)
