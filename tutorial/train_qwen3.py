"""Fine-tune Qwen3 4B Instruct on Korean conversations.

    python tutorial/train_qwen3.py
    python tutorial/inference_qwen3.py --model-name-or-path ./qwen3_korean_chat

Before it: tutorial/download_qwen3.py and dataset/prepare_qwen3_dataset.py. LoRA: the weights of the base stay
as they are, in 16 bit, and small matrices beside each linear layer are trained and saved. --load-in-4bit for a smaller
GPU, --no-use-lora to train every weight.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import train_arguments
from common.support.exit import run

DOWNLOAD = "Run python tutorial/download_qwen3.py first."
PREPARE = "Run python dataset/prepare_qwen3_dataset.py first."


def main():
    args = train_arguments(
        __doc__,
        hint=DOWNLOAD,
        model_name_or_path="./qwen3-4b",
        dataset_name_or_path="./qwen3_dataset.pt",
        save_dir="./qwen3_korean_chat",
        max_train_steps=60,
        batch_size=8,
        block_size=2048,
        use_lora=True,  # r 16, alpha 16, no dropout, every linear layer
        lora_lr=2e-4,
        lr=2e-5,  # with --no-use-lora
        lr_scheduler="linear",
        warmup_steps=5,
        log_interval=1,
        seed=3407,
    )

    # Imported here, so that --help and a mistyped option are answered at once.
    from common.checkpoint import find_checkpoint
    from common.dataset_file import load_dataset
    from common.device import start_device
    from common.optim import make_optimizer
    from common.tokenization import load_tokenizer
    from common.trainer import train
    from model.load import load_for_training
    from model.memory_plan import plan_memory
    from model.save import save_model

    device = start_device(args.seed, args.deterministic)  # on MoAI Platform: with automatic parallelization
    resume = find_checkpoint(args)  # of an interrupted run, or None
    tokenizer = load_tokenizer(args.model_name_or_path, args.block_size, hint=DOWNLOAD)
    dataset = load_dataset(args.dataset_name_or_path, tokenizer, args.block_size, hint=PREPARE)
    plan = plan_memory(args, device, dataset, resume)  # micro-batches and gradient checkpointing that fit
    model = load_for_training(args, plan, device)  # all weights, or with --use-lora an adapter; with its loss
    optimizer = make_optimizer(model, args, device)
    summary = train(model, optimizer, dataset, args, plan, device, resume)
    save_model(model, tokenizer, args.save_dir, base=args.model_name_or_path, run=summary)


if __name__ == "__main__":
    run(main)
