"""Download Cerebras-GPT 13B from the Hugging Face hub; 60 GB of free disk are advised.

    python tutorial/download_gpt_13b.py
    python tutorial/download_gpt_13b.py --tiny

It is open to everybody, no token is needed. An interrupted download
goes on where it stopped. With --tiny, a stand-in with random weights is written to rehearse with, offline.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.arguments import download_arguments
from common.download import download_model


def main():
    args = download_arguments(__doc__, model_name="cerebras/Cerebras-GPT-13B", save_dir="./cerebras-gpt-13b")
    if args.tiny:
        from model.tiny import write_tiny

        write_tiny("gpt", args.save_dir)
        print(f"Stand-in model saved in {args.save_dir}")
    else:
        download_model(args.model_name, args.save_dir, args.token)


if __name__ == "__main__":
    main()
