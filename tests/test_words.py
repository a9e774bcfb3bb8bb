"""Words that are known give the ids that the tokenizer gives the whole text, whatever the tokenizer and the text."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from common.support.exit import words
from common.tokenization import load_tokenizer
from common.words import BEGIN, as_list, encodings, words_of
from tests.helpers import KINDS, rows_of
from tests.test_preparation import ODD

MORE = ["(", '"', "don't", "-", "--", ".", "x_", "東京", "हिन्दी", "สวัสดี", "e\u0301", "\u0301", "👍🏽", "▁", "Ġ", "\r\n",
        "<s>", "<tool>", "<|endoftext|>", "the", "\u200b", "\u3000", "½", "Σ", "\x1c", "\u0600", "𒀀", "."]  # fmt: skip


PLAIN = "PreTrainedTokenizerFast"


def mixed(seed, count):
    """Texts of words and what is between words in no book, of all densities."""
    rng = random.Random(seed)
    own = [word for row in rows_of("train") for word in row["article"].split(" ")]
    for _ in range(count):
        odd = rng.choice([0, 0.05, 0.3, 0.9])
        some = [rng.choice(ODD + MORE) if rng.random() < odd else rng.choice(own) for _ in range(rng.randrange(80))]
        yield "".join(word + rng.choice([" ", " ", " ", "", "  "]) for word in some)


def the_same(tokenizer, texts):
    own = words_of(tokenizer)
    for first in range(0, len(texts), 20):  # some at a time, so that words are known, and others not
        some = texts[first : first + 20]
        for text, parts, whole in zip(
            some, own.ids([own.units(BEGIN + text) for text in some]), encodings(tokenizer, some, True)
        ):
            assert as_list(own.before + b"".join(parts) + own.after) == whole.ids, text
    return own


def changed(directory, tmp_path, change):
    """The tokenizer of `directory` after `change` of its tokenizer.json."""
    shutil.copytree(directory, tmp_path / "changed")
    (tmp_path / "changed" / "tokenizer.model").unlink(missing_ok=True)
    (tmp_path / "changed" / "config.json").unlink()
    for name, alter in (("tokenizer", change), ("tokenizer_config", lambda it: it.update(tokenizer_class=PLAIN))):
        path = tmp_path / "changed" / f"{name}.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        alter(content)
        path.write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "changed" / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(str(tmp_path / "changed"))


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_every_kind_of_model_stand_alone(kind, tokenizers, monkeypatch):
    monkeypatch.setattr(words, "KNOWN", 1000)  # all are forgotten now and then
    assert the_same(tokenizers[kind], list(mixed(seed=kind, count=300))).apart


def adds_end(it):
    it["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    it["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}


def metaspace(it):
    it.update(normalizer=None)
    it["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def lower_case(it):
    it["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}


def added(content, **options):
    def change(it):
        token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        number = max(*it["model"]["vocab"].values(), *(one["id"] for one in it["added_tokens"])) + 1
        it["added_tokens"].append({**token, "content": content, "id": number, **options})

    return change


def joined_words(it):
    """A token of two words, as some vocabularies have them."""
    vocabulary, merges = it["model"]["vocab"], it["model"]["merges"]
    for left, right in (("e", "Ġ"), ("eĠ", "t")):
        vocabulary[left + right] = len(vocabulary) + 100
        merges.insert(0, f"{left} {right}" if isinstance(merges[0], str) else [left, right])
    it["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    ("kind", "change", "apart"),
    [
        ("llama2", adds_end, True),
        ("llama2", metaspace, True),
        ("llama3", lower_case, True),
        ("llama2", added("<tool>", lstrip=True, rstrip=True), True),
        ("llama2", added("the"), False),  # behind it the text begins anew, with a "▁" of its own
        ("llama3", added(".", rstrip=True), False),
        ("smollm2", joined_words, False),
    ],
)
def test_words_of_changed_tokenizers(kind, change, apart, stand_ins, tmp_path):
    tokenizer = changed(stand_ins[kind], tmp_path, change)
    assert the_same(tokenizer, list(mixed(seed=1, count=300))).apart == apart
