"""Prepare Korean sentences with numbers, and how they are read aloud, for SmolLM2 135M.

    python dataset/prepare_smollm2_dataset.py
    python dataset/prepare_smollm2_dataset.py --dataset-name-or-path standard-library

Your own file or folder goes the same way, with the columns of short_alpaca() in dataset/templates.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and dataset/ are found from any directory

from common.support.cli import prepare_arguments
from common.support.exit import run
from dataset.templates import short_alpaca

DOWNLOAD = "Run python tutorial/download_smollm2.py first."


def main():
    args = prepare_arguments(
        __doc__,
        model_name_or_path="./smollm2-135m",
        dataset_name_or_path="korean-numbers",
        block_size=512,
        save_path="./smollm2_dataset.pt",
    )
    # Imported here, so that --help and a mistyped option are answered at once.
    from common.tokenization import load_tokenizer
    from dataset.prepare import prepare_dataset
    from dataset.sources import load_splits

    print("Loading Tokenizer...")
    tokenizer = load_tokenizer(args.model_name_or_path, args.block_size, hint=DOWNLOAD)
    splits, source = load_splits(args.dataset_name_or_path)
    print("Preprocessing dataset...")
    prepare_dataset(splits, source, short_alpaca, tokenizer, args)


if __name__ == "__main__":
    run(main)
