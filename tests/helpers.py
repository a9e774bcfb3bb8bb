"""What several test files need: how a refusal is checked, what is in a folder, which packages quantize here."""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch

from common.dataset_file import SPLITS, digest_of, digest_of_meta, label_counts
from tests.conftest import ROOT

# ------------------------------------------------------------------------------------------------ packages


def quantizes() -> bool:
    """Whether this machine's bitsandbytes is one that quantizes on a CPU; the older sets of packages have none."""
    try:
        return tuple(map(int, version("bitsandbytes").split(".")[:2])) >= (0, 46)
    except PackageNotFoundError:
        return False


def first_fast(count, values):
    """The values of a parametrized test: all but the first `count` are further variants, which make test-slow runs."""
    params = [value if isinstance(value, tuple) else (value,) for value in values]
    return [
        pytest.param(*value, marks=[] if number < count else pytest.mark.slow) for number, value in enumerate(params)
    ]


# of torch 2.2 or newer
needs_float16 = pytest.mark.skipif(
    not hasattr(torch.utils, "deterministic"), reason="this torch multiplies no float16 on a CPU"
)
# transformers before 4.43 has no Llama 3.1, nor its stand-in
HAS_LLAMA3_1 = tuple(map(int, version("transformers").split(".")[:2])) >= (4, 43)
HAS_QWEN3 = tuple(map(int, version("transformers").split(".")[:2])) >= (4, 51)
KINDS = ["llama2", "mistral", "llama3", "gpt", "smollm2"] + ["llama3_1"] * HAS_LLAMA3_1 + ["qwen3"] * HAS_QWEN3
needs_bitsandbytes = pytest.mark.skipif(not quantizes(), reason="needs a bitsandbytes that quantizes on a CPU")

# ------------------------------------------------------------------------------------------------ a reader's mistakes

TRAIN = "python tutorial/train_llama3.py --batch-size 8 --max-train-steps 1 --eval-rows 0"
PREPARE = "python dataset/prepare_llama3_dataset.py --block-size 128"
INFERENCE = "python tutorial/inference_llama3.py --max-new-tokens 2"
DOWNLOAD = "python tutorial/download_llama3_8b.py"
SCRIPTS = {"train": TRAIN, "prepare": PREPARE, "inference": f"{INFERENCE} --model-name-or-path ./llama3-8b"}
SAMPLE = ROOT / "dataset" / "samples" / "cnn_dailymail"


def error_of(done):
    """The reader's one line, the last of standard error; a library's warnings may stand before it."""
    assert done.returncode == 2, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == lines[-1:], done.stderr
    return errors[0]


def tells(done, *words):
    """Its line holds each of `words`, whatever the case, and ends as a sentence or a command would, not in the air."""
    line = error_of(done)
    missing = [word for word in words if str(word).lower() not in line.lower()]
    assert not missing, f"{missing} not in: {line}"
    assert len(line) < 500 and not line.rstrip().endswith((":", ",", "(")), line


def contents(folder):
    """Every file in `folder`, hidden ones too, with a hash of what is in it; the repository's links apart."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not name.startswith(".hf_home") and not path.is_symlink():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
    return found


def refusal(folder, warm):
    """A function that runs a command that must fail, with these words in its line, and leave `folder` as it was."""

    def check(command, *words, tells_of):
        before = contents(folder)
        tells(warm(command, *words, cwd=folder, ok=None), *tells_of)
        assert contents(folder) == before

    return check


# ------------------------------------------------------------------------------------------------ data


# The tensors of a split of a dataset file: their type and number of dimensions.
PARTS = {
    "input_ids": ("torch.int32", 1),
    "loss_mask": ("torch.bool", 1),
    "offsets": ("torch.int64", 1),
    "lengths": ("torch.int32", 1),
    "label_counts": ("torch.int32", 1),
}


def rows_of(split):
    return [json.loads(line) for line in (SAMPLE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def parquet(rows):
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def same_rows(one, other):
    for split in ("train", "validation"):
        assert one[split].keys() == other[split].keys() == set(PARTS)
        assert all(torch.equal(one[split][name], other[split][name]) for name in one[split])
    assert one["meta"]["sha256"] == other["meta"]["sha256"]
    assert one["meta"]["counts"] == other["meta"]["counts"]


def change_dataset(path, change):
    """Apply `change` to the document of a dataset file, which then is as one that was written so."""
    document = torch.load(path)
    change(document)
    if all(split in document for split in ("meta", *SPLITS)):
        sign(document)
    torch.save(document, path)


def sign(document):
    """Write the digests of what a document holds into it."""
    for name in SPLITS:
        document["meta"]["sha256"][name] = {part: digest_of(tensor) for part, tensor in document[name].items()}
    document["sha256"] = digest_of_meta(document["meta"])


def encode_rows(rows, template, tokenizer, block_size):
    """((token ids, index of the first token in the loss) of each row as it will stand in the dataset file; counts)."""
    from dataset.prepare import RowEncoder, write_rows

    encoded = []
    writer = SimpleNamespace(add=lambda row, kind: encoded.append(row))
    counts = write_rows("train", rows, RowEncoder(template, tokenizer, block_size, {}), writer)
    return [(one.ids, one.mask.index(1)) for one in encoded], dict(counts)


def split_of(input_ids, offsets, answer_starts):
    """A split of a dataset file, of the begins of the answers within their rows."""
    lengths = offsets.diff()
    place = torch.arange(len(input_ids)) - offsets[:-1].repeat_interleave(lengths)
    mask = place >= answer_starts.long().repeat_interleave(lengths)
    split = {"input_ids": input_ids.int(), "loss_mask": mask, "offsets": offsets.long(), "lengths": lengths.int()}
    return {**split, "label_counts": label_counts(mask, offsets.long())}


def answer_start(split, row):
    """Where the answer of a row begins within it."""
    return int(split["loss_mask"][split["offsets"][row] : split["offsets"][row + 1]].int().argmax())


def no_rows():
    """A split of a dataset file that has none."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return split_of(nothing, torch.zeros(1, dtype=torch.int64), nothing)


# ------------------------------------------------------------------------------------------------ what a training left

STEP = re.compile(
    r"\[Step (\d+)/(\d+)\] \| Loss: \d+\.\d{5} \| Duration: \d+\.\d\d \| Throughput: \d+\.\d\d tokens/sec"
)


def steps_in(text):
    """(step, total) of each step line."""
    return [tuple(map(int, match.groups())) for match in map(STEP.fullmatch, text.splitlines()) if match]


def records(directory):
    return [json.loads(line) for line in (directory / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


def adapter_weights(directory):
    from safetensors.torch import load_file

    return load_file(directory / "adapter_model.safetensors")


def save_pissa(base, directory):
    """Save an adapter that takes weights of its base away, so that the base is another model while it is off."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data *= 3
    adapted.save_pretrained(directory)


# ------------------------------------------------------------------------------------------------ answers under way


class Gate:
    """Inside `with`, lets a model compute only as many tokens as it is allowed, and counts them."""

    def __init__(self, model):
        self.calls = 0
        self.allowed = threading.Semaphore(0)
        self.hook = model.get_input_embeddings().register_forward_pre_hook(self.wait)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()
        self.allow(10_000)

    def allow(self, tokens):
        for _ in range(tokens):
            self.allowed.release()

    def wait(self, *_):
        assert self.allowed.acquire(timeout=60), "no more tokens are allowed"
        self.calls += 1
