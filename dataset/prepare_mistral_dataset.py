"""Prepare Python code instructions 18k (tasks and their code) for Mistral 7B.

    python dataset/prepare_mistral_dataset.py
    python dataset/prepare_mistral_dataset.py --dataset-name-or-path dataset/samples/python_code_instructions_18k_alpaca

Your own file or folder goes the same way, with the columns of alpaca() in dataset/templates.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and dataset/ are found from any directory

from common.support.cli import prepare_arguments
from common.support.exit import run
from dataset.templates import alpaca

DOWNLOAD = "Run python tutorial/download_mistral_7b.py first."


def main():
    args = prepare_arguments(
        __doc__,
        model_name_or_path="./mistral-7b",
        dataset_name_or_path="iamtarun/python_code_instructions_18k_alpaca",
        block_size=1024,
        save_path="./mistral_dataset.pt",
    )
    # Imported here, so that --help and a mistyped option are answered at once.
    from common.tokenization import load_tokenizer
    from dataset.prepare import prepare_dataset
    from dataset.sources import load_splits

    print("Loading Tokenizer...")
    tokenizer = load_tokenizer(args.model_name_or_path, args.block_size, hint=DOWNLOAD)
    splits, source = load_splits(args.dataset_name_or_path)
    print("Preprocessing dataset...")
    prepare_dataset(splits, source, alpaca, tokenizer, args)


if __name__ == "__main__":
    run(main)
