"""Ask the fine-tuned Llama3, 8B or 70B, for the summary of an article.

    python tutorial/inference_llama3.py
    python tutorial/inference_llama3.py --prompt-file article.txt
    python tutorial/inference_llama3.py --model-name-or-path ./llama3-8b
    python tutorial/inference_llama3.py --model-name-or-path ./llama3_70b_summarization
    python tutorial/inference_llama3.py --prompt-file questions.jsonl --save-path answers.jsonl

The second asks with your own text, the third asks the untrained model, to compare. The fourth asks the 70B, which is
also what the first does where there is no trained 8B. The last asks for a file of articles, a row each.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import inference_arguments
from common.support.exit import run
from dataset.templates import summarization

ARTICLE = """The harbour town of Velmora will close its old stone bridge for eleven months from March, after
engineers found that two of its five arches have sunk by four centimetres since 2019. The council voted 14 to
3 for the repair on Tuesday night. It will cost 9.2 million crowns, a third of which comes from the province.

"We waited too long, and waiting has become the expensive choice," said the mayor, Ilse Tarkan, after the
vote. Buses will take the northern ring road, which adds about 15 minutes to the way into the centre. A free
ferry for people on foot and on bicycles will cross every ten minutes between six in the morning and midnight.

Shopkeepers on the east bank fear for their trade. "Half of my customers walk over that bridge!" said Bram
Oduya, who sells fishing gear. The council promised to halve the rents of its market stalls until the bridge
is open again."""
TRAIN = (
    "Run python tutorial/train_llama3.py or train_llama3_70b.py first, or give a directory with --model-name-or-path."
)


def main():
    trained = ("./llama3_summarization", "./llama3_70b_summarization")
    newest = next((path for path in trained if Path(path).is_dir()), trained[0])
    args = inference_arguments(__doc__, summarization, hint=TRAIN, model_name_or_path=newest)

    # Imported here, so that --help and a mistyped option are answered at once.
    from common.device import start_device
    from common.tokenization import load_tokenizer
    from dataset.questions import load_questions
    from model.generate import answer_questions
    from model.load import load_model

    # The same template as in training, with an empty answer.
    question = {"article": args.prompt or ARTICLE, "highlights": ""}
    questions = load_questions(args, summarization, question)  # this one, or with --save-path those of --prompt-file

    device = start_device(args.seed)
    tokenizer = load_tokenizer(args.model_name_or_path, hint=TRAIN)
    prompts = questions.encode(tokenizer, args)
    model = load_model(args.model_name_or_path, device.torch_device, device.dtype, args.bits)
    answer_questions(model, tokenizer, prompts, questions.answers, args, device)


if __name__ == "__main__":
    run(main)
