"""Download Cerebras-GPT 13B from the Hugging Face hub; 60 GB of free disk are advised.

    python tutorial/download_gpt_13b.py

It is open to everybody, no token is needed; its .bin files become safetensors. An interrupted download
resumes where it stopped. With --tiny, a tiny model with random weights is written instead, to rehearse offline.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import download_arguments
from common.support.exit import run
from model.tiny import download_or_tiny


def main():
    args = download_arguments(__doc__, model_name="cerebras/Cerebras-GPT-13B", save_dir="./cerebras-gpt-13b")
    download_or_tiny(args, "gpt")


if __name__ == "__main__":
    run(main)
