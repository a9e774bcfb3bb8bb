"""Make one plain model of an adapter and its base, for tools that know no adapters.

    python tutorial/merge_adapter.py --model-name-or-path ./llama3_1_korean --save-dir ./llama3_1_korean_merged

The base is loaded as it is stored, in 16 bit, also where the training held it in 4 bit: what 4 bit had rounded away
is there again. Needs main memory for the whole base (Llama 3.1 8B: 16 GB), and no GPU. With twice as much, it merges in
float32, which is more precise.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import Parser
from common.support.exit import UserError, run
from common.support.files import require_disk_space, require_writable
from common.support.model_dir import ModelSource, base_models, require_adapter


def main():
    parser = Parser(__doc__)
    parser.add_argument("--model-name-or-path", default="./llama3_1_korean", help="directory of the adapter")
    parser.add_argument("--save-dir", default="./llama3_1_korean_merged", help="directory for the whole model")
    args = parser.parse_args()
    adapter = args.model_name_or_path
    source = ModelSource(adapter)
    base = source.base
    require_writable(args.save_dir, "--save-dir")
    if Path(args.save_dir).resolve() in (Path(adapter).resolve(), Path(base).resolve()):
        raise UserError(f"--save-dir {args.save_dir} is the directory of the adapter or of its base. Give another.")
    require_adapter(adapter)
    require_disk_space(ModelSource(base).bytes_of_weights, args.save_dir, "The merged model")

    # Imported here, so that --help and a mistyped option are answered at once.
    import torch

    from common.device import free_memory, total_memory
    from common.tokenization import load_tokenizer
    from model.load import load_model
    from model.lora import merge
    from model.save import save_model
    from model.weight_format import detect_format

    tokenizer = load_tokenizer(adapter)
    stored = ModelSource(base).bytes_of_weights
    bits = detect_format(base).bits
    cpu = torch.device("cpu")
    needed = stored * 16 // min(16, bits)
    if needed > total_memory(cpu):  # The system would kill the process, or all of a notebook's runtime.
        raise UserError(
            f"Merging takes {needed / 1e9:.1f} GB of main memory, and this machine has {total_memory(cpu) / 1e9:.1f} "
            "GB. Use a larger one, or use the adapter without merging it."
        )
    # In float32, if it fits: then the weights are rounded once, at the end.
    size = stored * 32 // bits
    dtype = torch.float32 if 1.2 * size < free_memory() else None
    model = load_model(adapter, cpu, dtype, bits=0, options=())

    model = merge(model)  # W + alpha / r * B A, layer by layer
    run = {**source.run, "made_of": base_models(base, merged=adapter)}
    save_model(model, tokenizer, args.save_dir, base, run)


if __name__ == "__main__":
    run(main)
