"""Which of a repository's files on the hub are fetched."""

from __future__ import annotations

import re

from common import UserError

# The weights as transformers finds them: the first kind that a repository has, and no other. So no twin in another
# format is fetched (.pth, .h5, .msgpack, .onnx, .gguf, consolidated.safetensors) and no folder such as original/.
WEIGHTS = (
    r"model\.safetensors",
    r"model[-_]\d+-of-\d+\.safetensors",
    r"pytorch_model\.bin",  # Cerebras-GPT has only these
    r"pytorch_model[-_]\d+-of-\d+\.bin",
)
# Beside the weights: config, tokenizer, chat template, code, licence, readme.
SMALL_FILES = r"[^/]+\.(json|txt|model|jinja|py|md)|LICEN[CS]E|NOTICE"


def choose_files(repo_id, on_hub):
    """The names that `download_model` fetches, out of the repository's: the small files, and the weights once."""
    weights = next(filter(None, ([n for n in on_hub if re.fullmatch(kind, n)] for kind in WEIGHTS)), None)
    if not weights:
        raise UserError(f"{repo_id} has no weights that transformers reads as they are: choose another model")
    index = re.sub(r"[-_]\d+-of-\d+", "", weights[0]) + ".index.json"  # which tensor is in which shard
    small = [n for n in on_hub if re.fullmatch(SMALL_FILES, n) and (n == index or not n.endswith(".index.json"))]
    return small + weights
