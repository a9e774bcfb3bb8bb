"""Ask the fine-tuned Llama 3.1 8B a question in Korean.

    python tutorial/inference_llama3_1.py
    python tutorial/inference_llama3_1.py --prompt "..."
    python tutorial/inference_llama3_1.py --model-name-or-path ./llama3.1-8b

The second asks with your own text, the third asks the untrained model, to compare.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.arguments import inference_arguments
from common.model_directory import require_model
from common.tokenization import encode_prompt, load_tokenizer
from dataset.templates import korean_alpaca

QUESTION = "비 오는 날 집에서 할 수 있는 일을 세 가지 추천해 주세요."
TRAIN = "Run python tutorial/train_llama3_1.py first, or give a directory with --model-name-or-path."


def main():
    args = inference_arguments(__doc__, model_name_or_path="./llama3_1_korean")
    require_model(args.model_name_or_path, hint=TRAIN, template=korean_alpaca)

    # imported below the arguments, so that --help and a mistyped option are answered at once
    from common.accelerator import start_accelerator
    from model.generation import prompt_room, stream_answer
    from model.loading import load_model

    accelerator = start_accelerator(args.seed)
    tokenizer = load_tokenizer(args.model_name_or_path, hint=TRAIN)
    model = load_model(args.model_name_or_path, accelerator.device, accelerator.dtype, args.bits)
    # the template of the training, so that the model is asked in the format in which it learned
    example = korean_alpaca({"instruction": args.prompt or QUESTION, "input": "", "output": ""})
    prompt = encode_prompt(tokenizer, example, prompt_room(model, args.max_new_tokens))
    stream_answer(model, tokenizer, prompt, args.max_new_tokens, args.temperature)


if __name__ == "__main__":
    main()
