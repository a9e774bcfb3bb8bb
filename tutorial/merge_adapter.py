"""Make one plain model of an adapter and its base, for tools that know no adapters.

    python tutorial/merge_adapter.py --model-name-or-path ./llama3_1_korean --save-dir ./llama3_1_korean_merged

The base is loaded as it is stored, in 16 bit, also where the training held it in 4 bit: what 4 bit had rounded away
is there again. Needs main memory for the whole base (Llama 3.1 8B: 16 GB), and no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.arguments import merge_arguments
from common.download import require_adapter
from common.tokenization import load_tokenizer
from model.loading import load_model, require_disk, save_model


def main():
    args = merge_arguments(__doc__, model_name_or_path="./llama3_1_korean", save_dir="./llama3_1_korean_merged")
    require_adapter(args.model_name_or_path)
    tokenizer = load_tokenizer(args.model_name_or_path)
    model = load_model(args.model_name_or_path, "cpu", dtype=None, bits=0)

    model = model.merge_and_unload()  # W + alpha / r * B A, layer by layer
    require_disk(model, args.save_dir)
    save_model(model, tokenizer, args.save_dir)


if __name__ == "__main__":
    main()
