"""Prepare Korean safe conversation (instructions and their answers) for Llama 3.1 8B.

    python dataset/prepare_llama3_1_dataset.py
    python dataset/prepare_llama3_1_dataset.py --dataset-name-or-path dataset/samples/korean_safe_conversation

Your own file or folder goes the same way, with the columns of korean_alpaca() in dataset/templates.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and dataset/ are found from any directory

from common.support.cli import prepare_arguments
from common.support.exit import run
from dataset.templates import korean_alpaca

DOWNLOAD = "Run python tutorial/download_llama3_1_8b.py first."


def main():
    args = prepare_arguments(
        __doc__,
        model_name_or_path="./llama3.1-8b",
        dataset_name_or_path="jojo0217/korean_safe_conversation",
        block_size=2048,
        save_path="./llama3_1_dataset.pt",
    )
    # Imported here, so that --help and a mistyped option are answered at once.
    from common.tokenization import load_tokenizer
    from dataset.prepare import prepare_dataset
    from dataset.sources import load_splits

    print("Loading Tokenizer...")
    tokenizer = load_tokenizer(args.model_name_or_path, args.block_size, hint=DOWNLOAD)
    splits, source = load_splits(args.dataset_name_or_path)
    print("Preprocessing dataset...")
    prepare_dataset(splits, source, korean_alpaca, tokenizer, args)


if __name__ == "__main__":
    run(main)
