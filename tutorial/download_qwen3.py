"""Download Qwen3 4B Instruct (2507) from the Hugging Face hub; 10 GB of free disk are advised.

    python tutorial/download_qwen3.py

It is open to everybody, no token is needed. An interrupted download resumes where it stopped. With --tiny, a tiny
model with random weights is written instead, to rehearse offline.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import download_arguments
from common.support.exit import run
from model.tiny import download_or_tiny


def main():
    args = download_arguments(__doc__, model_name="Qwen/Qwen3-4B-Instruct-2507", save_dir="./qwen3-4b")
    download_or_tiny(args, "qwen3")


if __name__ == "__main__":
    run(main)
