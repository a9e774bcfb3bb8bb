"""Prepare CNN/Daily Mail (news articles and their highlights) for Llama3 8B and 70B.

    python dataset/prepare_llama3_dataset.py
    python dataset/prepare_llama3_dataset.py --dataset-name-or-path dataset/samples/cnn_dailymail

Both sizes have the same tokenizer: one file serves both, and the tokenizer of either makes it.

Your own file or folder goes the same way, with the columns of summarization() in dataset/templates.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and dataset/ are found from any directory

from common.support.cli import prepare_arguments
from common.support.exit import run
from dataset.templates import summarization

DOWNLOAD = "Run python tutorial/download_llama3_8b.py or download_llama3_70b.py first."


def main():
    downloaded = [path for path in ("./llama3-8b", "./llama3-70b") if Path(path).is_dir()]
    args = prepare_arguments(
        __doc__,
        model_name_or_path=downloaded[0] if downloaded else "./llama3-8b",
        dataset_name_or_path="abisee/cnn_dailymail",
        block_size=1024,
        save_path="./llama3_dataset.pt",
    )
    # Imported here, so that --help and a mistyped option are answered at once.
    from common.tokenization import load_tokenizer
    from dataset.prepare import prepare_dataset
    from dataset.sources import load_splits

    print("Loading Tokenizer...")
    tokenizer = load_tokenizer(args.model_name_or_path, args.block_size, hint=DOWNLOAD)
    splits, source = load_splits(args.dataset_name_or_path)
    print("Preprocessing dataset...")
    prepare_dataset(splits, source, summarization, tokenizer, args)


if __name__ == "__main__":
    run(main)
