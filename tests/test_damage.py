"""Damaged dataset files, hundreds of them: each is refused with one line, or holds what the undamaged one holds."""

from __future__ import annotations

import copy
import io
import pickle
import random

import pytest
import torch

from common.dataset_file import digest_of_meta, load_dataset
from common.support.exit import UserError
from common.tokenization import load_tokenizer
from tests.helpers import PARTS

FILES = 400
SEED = 20261127  # printed with each failure


@pytest.fixture(scope="module")
def whole(base):
    """(tokenizer, bytes of the file, what it holds)"""
    path = base / "llama3_dataset.pt"
    return load_tokenizer(str(base / "llama3-8b")), path.read_bytes(), torch.load(path)


def flipped(rng, content, document):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def overwritten(rng, content, document):
    content, length = bytearray(content), rng.choice([1, 16, 512, 4096])
    place = rng.randrange(len(content) - length)
    content[place : place + length] = rng.choice(
        [bytes(length), bytes(rng.getrandbits(8) for _ in range(length)) if length < 64 else b"\xff" * length]
    )
    return bytes(content)


def cut_short(rng, content, document):
    return content[: rng.randrange(len(content))]


def pieces_swapped(rng, content, document):
    one, other = sorted(rng.sample(range(0, len(content) - 64), 2))
    return content[:one] + content[other : other + 64] + content[one + 64 :]


def saved(document):
    buffer = io.BytesIO()
    torch.save(document, buffer)
    return buffer.getvalue()


def part_changed(rng, content, document):
    """One tensor of another type, shape or with other numbers."""
    document = copy.deepcopy(document)
    split, part = document[rng.choice(["train", "validation"])], rng.choice(sorted(PARTS))
    tensor, place = split[part], rng.randrange(len(split[part]))
    change = rng.choice(
        ["float", "int16", "two dimensions", "shorter", "longer", "list", "none", "lost", "negative", "huge",
         "reversed", "not from 0", "sparse", "empty"]
    )  # fmt: skip
    number = {"negative": -1, "huge": 2**31 - 1 if part != "loss_mask" else 1}.get(change)
    if number is not None:
        tensor[place] = not tensor[place] if part == "loss_mask" else number
    elif change == "lost":
        del split[part]
    else:
        split[part] = {
            "float": lambda: tensor.float(),
            "int16": lambda: tensor.to(torch.int16),
            "two dimensions": lambda: tensor[None],
            "shorter": lambda: tensor[:-1].clone(),
            "longer": lambda: torch.cat([tensor, tensor[-1:]]),
            "list": lambda: tensor.tolist(),
            "none": lambda: None,
            "reversed": lambda: tensor.flip(0),
            "not from 0": lambda: tensor + 1 if part != "loss_mask" else ~tensor,
            "sparse": lambda: tensor.to_sparse(),
            "empty": lambda: tensor[:0].clone(),
        }[change]()
    return saved(document)


def meta_changed(rng, content, document):
    document = copy.deepcopy(document)
    name = rng.choice([*document["meta"], "meta"])
    value = rng.choice([None, -1, 0, 1.5, "x", [], {}, True, torch.zeros(2)])
    if name == "meta":
        document["meta"] = value
    else:
        document["meta"][name] = value
    return saved(document)


def top_changed(rng, content, document):
    document = copy.deepcopy(document)
    name = rng.choice([*document])
    if rng.random() < 0.3:
        del document[name]
    else:
        document[name] = rng.choice([None, 0, "x", [], {}, torch.zeros(2), {"input_ids": torch.zeros(3)}])
    return saved(document)


class Runs:
    """Runs code where a pickle is opened without care."""

    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('it-ran').touch()",)


def with_code(rng, content, document):
    if rng.random() < 0.5:
        return pickle.dumps({**document, "meta": Runs()})
    return saved({**document, rng.choice([*document, "more"]): Runs()})


DAMAGES = [flipped, flipped, overwritten, cut_short, pieces_swapped, part_changed, part_changed, meta_changed,
           top_changed, with_code]  # fmt: skip


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def test_damaged_files(whole, tmp_path, monkeypatch):
    tokenizer, content, document = whole
    monkeypatch.chdir(tmp_path)
    refused = 0
    for number in range(FILES):
        rng = random.Random(SEED + number)
        damage = rng.choice(DAMAGES)
        path = tmp_path / f"{number}.pt"
        path.write_bytes(damage(rng, content, document))
        try:
            opened = load_dataset(str(path), tokenizer, 128)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and "again" in str(error), (damage.__name__, SEED + number)
        else:
            for part in ("format", "version", "meta", "train", "validation"):
                assert same(opened[part], document[part]), (damage.__name__, SEED + number, part)
        path.unlink()
    assert not (tmp_path / "it-ran").exists()
    assert refused > 0.8 * FILES


def test_damage_is_named(whole, tmp_path):
    tokenizer, content, document = whole
    path = tmp_path / "d.pt"
    place = content.index(document["train"]["input_ids"].numpy().tobytes()[:64])
    path.write_bytes(content[:place] + b"\x07" + content[place + 1 :])
    with pytest.raises(UserError, match="is damaged: checksum mismatch in train"):
        load_dataset(str(path), tokenizer, 128)


def test_an_older_file_is_one_line(whole, tmp_path):
    tokenizer, _, document = whole
    path = tmp_path / "d.pt"
    torch.save({**document, "version": 1}, path)
    with pytest.raises(UserError, match="has format version 1, but these scripts read 3"):
        load_dataset(str(path), tokenizer, 128)


@pytest.mark.parametrize(
    ("made_by", "said"), [("4.0.0", ", or by transformers 4.0.0, not "), (None, ", so its token ids")]
)
def test_a_file_of_another_tokenizer_or_version_is_one_line(made_by, said, whole, tmp_path):
    tokenizer, _, document = whole
    path = tmp_path / "d.pt"
    meta = {**document["meta"], "tokenizer": "0123456789abcdef"}
    meta["transformers"] = made_by or meta["transformers"]
    torch.save({**document, "meta": meta, "sha256": digest_of_meta(meta)}, path)
    with pytest.raises(UserError, match=f"made with another tokenizer .that of .*?.{said}"):
        load_dataset(str(path), tokenizer, 128)
