"""Prepare Korean conversations for Qwen3 4B, by the chat template of its own tokenizer.

    python dataset/prepare_qwen3_dataset.py
    python dataset/prepare_qwen3_dataset.py --dataset-name-or-path dataset/samples/korean_conversations

Your own file or folder goes the same way: rows with `messages`, with ShareGPT's `conversations`, or with the columns
instruction, input and output, of which each row becomes a conversation of two turns.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and dataset/ are found from any directory

from common.support.cli import prepare_arguments
from common.support.exit import run
from dataset.templates import chat

DOWNLOAD = "Run python tutorial/download_qwen3.py first."


def main():
    args = prepare_arguments(
        __doc__,
        model_name_or_path="./qwen3-4b",
        dataset_name_or_path="jojo0217/korean_safe_conversation",
        block_size=2048,
        save_path="./qwen3_dataset.pt",
    )
    # Imported here, so that --help and a mistyped option are answered at once.
    from common.tokenization import load_tokenizer
    from dataset.prepare import prepare_dataset
    from dataset.sources import load_splits

    print("Loading Tokenizer...")
    tokenizer = load_tokenizer(args.model_name_or_path, args.block_size, hint=DOWNLOAD)
    splits, source = load_splits(args.dataset_name_or_path)
    print("Preprocessing dataset...")
    prepare_dataset(splits, source, chat, tokenizer, args)


if __name__ == "__main__":
    run(main)
