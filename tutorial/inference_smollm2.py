"""Ask the fine-tuned SmolLM2 135M how a sentence with numbers is read aloud.

    python tutorial/inference_smollm2.py
    python tutorial/inference_smollm2.py --prompt "3번 출구에서 만나요."
    python tutorial/inference_smollm2.py --model-name-or-path ./smollm2-135m
    python tutorial/inference_smollm2.py --prompt-file questions.jsonl --save-path answers.jsonl

The second asks with your own text, the third asks the untrained model, to compare. The fourth answers a file of
questions, a row each.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import inference_arguments
from common.support.exit import run
from dataset.templates import short_alpaca

SENTENCE = "3번 출구에서 오후 4시에 만나요."
TRAIN = "Run python tutorial/train_smollm2.py first, or give a directory with --model-name-or-path."


def main():
    args = inference_arguments(__doc__, short_alpaca, hint=TRAIN, model_name_or_path="./smollm2_korean_numbers")

    # Imported here, so that --help and a mistyped option are answered at once.
    from common.device import start_device
    from common.tokenization import load_tokenizer
    from dataset.questions import load_questions
    from model.generate import answer_questions
    from model.load import load_model

    # The same template as in training, with an empty answer.
    question = {"instruction": args.prompt or SENTENCE, "input": "", "output": ""}
    questions = load_questions(args, short_alpaca, question)  # this one, or with --save-path those of --prompt-file

    device = start_device(args.seed)
    tokenizer = load_tokenizer(args.model_name_or_path, hint=TRAIN)
    prompts = questions.encode(tokenizer, args)
    model = load_model(args.model_name_or_path, device.torch_device, device.dtype, args.bits)
    answer_questions(model, tokenizer, prompts, questions.answers, args, device)


if __name__ == "__main__":
    run(main)
