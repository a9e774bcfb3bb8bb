"""Fine-tune SmolLM2 135M to read numbers as Korean does: "3번 출구" is "삼 번 출구".

    python tutorial/train_smollm2.py
    python tutorial/inference_smollm2.py --model-name-or-path ./smollm2_korean_numbers

Before it: tutorial/download_smollm2.py and dataset/prepare_smollm2_dataset.py. Every weight is trained.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import train_arguments
from common.support.exit import run

DOWNLOAD = "Run python tutorial/download_smollm2.py first."
PREPARE = "Run python dataset/prepare_smollm2_dataset.py first."


def main():
    args = train_arguments(
        __doc__,
        hint=DOWNLOAD,
        model_name_or_path="./smollm2-135m",
        dataset_name_or_path="./smollm2_dataset.pt",
        save_dir="./smollm2_korean_numbers",
        batch_size=16,
        block_size=512,
        lr=5e-4,
        lr_scheduler="linear",
        warmup_steps=5,
        log_interval=1,
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
