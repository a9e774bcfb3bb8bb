"""Download Llama2 13B from the Hugging Face hub; 50 GB of free disk are advised.

    hf auth login
    python tutorial/download_llama2_13b.py

It is gated: accept its licence at https://huggingface.co/meta-llama/Llama-2-13b-hf first. `hf auth login` asks for a
token of https://huggingface.co/settings/tokens. An interrupted download resumes where it stopped. With --tiny, a tiny
model with random weights is written instead, to rehearse offline.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import download_arguments
from common.support.exit import run
from model.tiny import download_or_tiny


def main():
    args = download_arguments(__doc__, model_name="meta-llama/Llama-2-13b-hf", save_dir="./llama-2-13b-hf")
    download_or_tiny(args, "llama2")


if __name__ == "__main__":
    run(main)
