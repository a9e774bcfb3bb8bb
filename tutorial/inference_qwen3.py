"""Talk with the fine-tuned Qwen3 4B, or with any model that has a chat template.

    python tutorial/inference_qwen3.py
    python tutorial/inference_qwen3.py --prompt "..." --system "..."
    python tutorial/inference_qwen3.py --model-name-or-path ./qwen3-4b
    python tutorial/inference_qwen3.py --prompt-file questions.jsonl --save-path answers.jsonl

The first is a conversation in a terminal, until an empty line; its oldest exchanges are forgotten where the model has
no room for more. The second asks one question, --system says how to answer. The third talks with the untrained model.
The fourth answers a file of questions or conversations, a row each.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import inference_arguments
from common.support.exit import UserError, run
from dataset.templates import chat

QUESTION = "비 오는 날 집에서 할 수 있는 일을 세 가지 추천해 주세요."
TRAIN = "Run python tutorial/train_qwen3.py first, or give a directory with --model-name-or-path."


def main():
    args = inference_arguments(__doc__, chat, hint=TRAIN, model_name_or_path="./qwen3_korean_chat")

    # Imported here, so that --help and a mistyped option are answered at once.
    from common.chat_template import encode_question, get_chat_template
    from common.device import start_device
    from common.tokenization import load_tokenizer
    from dataset.questions import load_questions
    from model.generate import answer_questions, prompt_room, stream_answer
    from model.load import load_model

    question = {"prompt": args.prompt or QUESTION, "system": args.system}
    questions = load_questions(args, chat, question)  # this one, or with --save-path those of --prompt-file

    device = start_device(args.seed)
    tokenizer = load_tokenizer(args.model_name_or_path, hint=TRAIN)
    template = get_chat_template(tokenizer)  # the tokenizer's own, as in the training
    ends = [template.end_of_turn()]
    prompts = questions.encode(tokenizer, args, template)
    model = load_model(args.model_name_or_path, device.torch_device, device.dtype, args.bits)
    if args.save_path or args.prompt or not (sys.stdin and sys.stdin.isatty()):
        return answer_questions(model, tokenizer, prompts, questions.answers, args, device, ends)

    print("Type a message and press Enter. An empty line ends the conversation.")
    messages = [{"role": "system", "content": args.system}] if args.system else []
    for text in iter(typed, ""):
        messages.append({"role": "user", "content": text})
        prompt = encode_question(template, messages, None, prompt_room(model, args.max_new_tokens))
        answer = stream_answer(model, tokenizer, prompt, args.max_new_tokens, args.temperature, ends, show_prompt=False)
        messages.append({"role": "assistant", "content": answer})


def typed() -> str:
    from dataset.columns import to_text

    try:
        return to_text(input("\n> ")).strip()
    except EOFError:  # Ctrl-D
        return ""
    except UnicodeDecodeError:
        raise UserError("What was typed is not UTF-8 text: set the terminal to UTF-8.") from None


if __name__ == "__main__":
    run(main)
