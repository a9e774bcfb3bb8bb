"""Ask the fine-tuned Cerebras-GPT 13B for Python code.

    python tutorial/inference_gpt.py
    python tutorial/inference_gpt.py --prompt "Write a function that ..."
    python tutorial/inference_gpt.py --model-name-or-path ./cerebras-gpt-13b
    python tutorial/inference_gpt.py --prompt-file questions.jsonl --save-path answers.jsonl

The second asks with your own text, the third asks the untrained model, to compare. The fourth answers a file of
questions, a row each.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import inference_arguments
from common.support.exit import run
from dataset.templates import instruction

TASK = """Write a Python function that merges two sorted lists of numbers into one sorted list without calling sort.
It must work when one of the lists is empty, and take time in proportion to their lengths."""
TRAIN = "Run python tutorial/train_gpt.py first, or give a directory with --model-name-or-path."


def main():
    args = inference_arguments(__doc__, instruction, hint=TRAIN, model_name_or_path="./code_generation")

    # Imported here, so that --help and a mistyped option are answered at once.
    from common.device import start_device
    from common.tokenization import load_tokenizer
    from dataset.questions import load_questions
    from model.generate import answer_questions
    from model.load import load_model

    # The same template as in training, with an empty answer.
    question = {"instruction": args.prompt or TASK, "output": ""}
    questions = load_questions(args, instruction, question)  # this one, or with --save-path those of --prompt-file

    device = start_device(args.seed)
    tokenizer = load_tokenizer(args.model_name_or_path, hint=TRAIN)
    prompts = questions.encode(tokenizer, args)
    model = load_model(args.model_name_or_path, device.torch_device, device.dtype, args.bits)
    answer_questions(model, tokenizer, prompts, questions.answers, args, device)


if __name__ == "__main__":
    run(main)
