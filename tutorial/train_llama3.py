"""Fine-tune Llama3 8B to summarize news articles.

    python tutorial/train_llama3.py
    python tutorial/inference_llama3.py --model-name-or-path ./llama3_summarization

Before it: tutorial/download_llama3_8b.py and dataset/prepare_llama3_dataset.py. Every weight is trained.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.accelerator import start_accelerator
from common.arguments import train_arguments
from common.dataset_cache import load_dataset
from common.download import require_model
from common.tokenization import load_tokenizer
from common.training import make_optimizer, train
from model.loading import load_to_train, require_disk, save_model
from model.loss import CausalLMLoss

DOWNLOAD = "Run python tutorial/download_llama3_8b.py first."
PREPARE = "Run python dataset/prepare_llama3_dataset.py first."


def main():
    args = train_arguments(
        __doc__,
        model_name_or_path="./llama3-8b",
        dataset_name_or_path="./llama3_dataset.pt",
        save_dir="./llama3_summarization",
        batch_size=256,
        lr=1e-5,
        log_interval=2,
    )
    require_model(args.model_name_or_path, hint=DOWNLOAD)

    # before the model is built: on MoAI Platform this turns automatic parallelization on
    accelerator = start_accelerator(args.seed, repeatable=True)

    tokenizer = load_tokenizer(args.model_name_or_path, args.block_size, hint=DOWNLOAD)
    dataset = load_dataset(args.dataset_name_or_path, tokenizer, args.block_size, hint=PREPARE)
    model = load_to_train(args, accelerator)  # every weight, or with --use-lora an adapter on frozen ones
    require_disk(model, args.save_dir)

    optimizer = make_optimizer(model, args, accelerator)
    loss_module = CausalLMLoss(model, static_shapes=accelerator.static_shapes)
    train(loss_module, optimizer, dataset, args, accelerator)

    save_model(model, tokenizer, args.save_dir, template=dataset["meta"]["template"])


if __name__ == "__main__":
    main()
