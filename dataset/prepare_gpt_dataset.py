"""Prepare Evol-Instruct Python 26k (instructions and their answers with code) for Cerebras-GPT 13B.

    python dataset/prepare_gpt_dataset.py
    python dataset/prepare_gpt_dataset.py --dataset-name-or-path dataset/samples/Evol-Instruct-Python-26k

Your own file or folder goes the same way, with the columns of instruction() in dataset/templates.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and dataset/ are found from any directory

from common.support.cli import prepare_arguments
from common.support.exit import run
from dataset.templates import instruction

DOWNLOAD = "Run python tutorial/download_gpt_13b.py first."


def main():
    args = prepare_arguments(
        __doc__,
        model_name_or_path="./cerebras-gpt-13b",
        dataset_name_or_path="mlabonne/Evol-Instruct-Python-26k",
        block_size=1024,
        save_path="./gpt_dataset.pt",
    )
    # Imported here, so that --help and a mistyped option are answered at once.
    from common.tokenization import load_tokenizer
    from dataset.prepare import prepare_dataset
    from dataset.sources import load_splits

    print("Loading Tokenizer...")
    tokenizer = load_tokenizer(args.model_name_or_path, args.block_size, hint=DOWNLOAD)
    splits, source = load_splits(args.dataset_name_or_path)
    print("Preprocessing dataset...")
    prepare_dataset(splits, source, instruction, tokenizer, args)


if __name__ == "__main__":
    run(main)
