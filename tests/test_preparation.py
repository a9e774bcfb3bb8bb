"""From rows to the dataset file: prompts are truncated by one rule, whatever the tokenizer and the text."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time

import pytest
import torch

from common.tokenization import Example, encode_examples, encode_prompt, load_tokenizer
from dataset.templates import alpaca, instruction, summarization
from tests.conftest import TIMEOUT, start
from tests.helpers import KINDS, PREPARE, SAMPLE, contents, rows_of, tells


def plain_truncation(tokenizer, pieces, limit):
    """The rule: cut the last text that may be cut where its excess tokens begin, tokenize all again."""
    backend, pieces = tokenizer.backend_tokenizer, list(pieces)
    backend.encode_special_tokens = True
    backend.no_truncation()
    while True:
        encoding = backend.encode("".join(pieces))
        ids = encoding.ids[:-1] if encoding.ids[-1:] == [tokenizer.eos_token_id] else encoding.ids
        place = max((place for place in range(1, len(pieces), 2) if pieces[place]), default=None)
        if len(ids) <= limit or place is None:
            return ids
        start = sum(map(len, pieces[:place]))
        stop, excess = start + len(pieces[place]), len(ids) - limit
        offsets = [offset for offset, special in zip(encoding.offsets, encoding.special_tokens_mask) if not special]
        begins = [begin - start for begin, _ in offsets if start <= begin < stop]
        cut = begins[-excess] if excess < len(begins) else 0
        pieces[place] = pieces[place][: min(cut, len(pieces[place]) - 1)]


ODD = [
    "  ",
    "\n\n",
    "...",
    "😀",
    "\t",
    "한국어" * 3,
    "a" * 80,
    "1234567",
    "</s>",
    "x\0y",
    " \u00a0 ",
    "—",
    "naïve",
    "٣٤",
]


def texts(seed, count):
    """Text of all lengths: words, words among odd ones, and no spaces at all."""
    rng = random.Random(seed)
    words = [word for row in rows_of("train") for word in row["article"].split(" ")]
    for _ in range(count):
        some = rng.choices(words, k=max(1, int(rng.lognormvariate(0, 0.8) * 400)))
        kind = rng.choice(["words", "words", "odd", "no spaces"])
        if kind == "odd":
            some = [rng.choice(ODD) if rng.random() < 0.2 else word for word in some]
        yield ("" if kind == "no spaces" else " ").join(some)


def examples(seed, count):
    """Examples of each template; their text is up to forty times as long as the limits below."""
    some = list(texts(seed, count))
    for template in (summarization, alpaca, instruction, unframed):
        for one, other in zip(some[: count // 2], some[count // 2 :]):
            yield template({"article": one, "instruction": one, "input": other, "highlights": "", "output": ""})


def unframed(row):
    return Example(["", row["article"], "", row["input"]], "")


@pytest.mark.parametrize("block", [8, 64, 256, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_prompts_are_those_of_the_rule(kind, block, tokenizers):
    for number, example in enumerate(examples(seed=block, count=60)):
        limit = block - 1 - number % min(40, block)
        expected = plain_truncation(tokenizers[kind], example.prompt, limit)
        assert encode_prompt(tokenizers[kind], example, limit) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_examples_have_the_ids_of_one_at_a_time(kind, tokenizers):
    tokenizer, answer = tokenizers[kind], "A short answer 😀"
    some = [example._replace(answer=answer) for example in examples(seed=7, count=40)]
    end = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    for example, encoded in zip(some, encode_examples(tokenizer, some, 200)):
        assert encoded.ids == encode_prompt(tokenizer, example, 200 - len(end)) + end
        whole = encode_prompt(tokenizer, example, 10**9)
        assert encoded.prompt_truncated == (len(whole) + len(end) > 200)


def test_text_that_needs_few_tokens_is_not_truncated(tokenizers):
    """Far more letters than are looked at first, in few tokens."""
    tokenizer = tokenizers["smollm2"]
    word = max((token for token in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]+", token)), key=len)[1:]
    text = " ".join(["a", *[word] * 400])
    needed = len(tokenizer(text)["input_ids"])
    assert len(text) > 7 * needed
    for limit in (needed, needed - 1, needed // 2):
        expected = plain_truncation(tokenizer, ["", text], limit)
        assert encode_prompt(tokenizer, Example(["", text], None), limit) == expected


# ------------------------------------------------------------------------------------------------ other tokenizers


def changed(directory, folder, change):
    """The tokenizer of `directory` after `change` of its tokenizer.json."""
    shutil.copytree(directory, folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')

    def plain(it):
        it.update(tokenizer_class="PreTrainedTokenizerFast")

    for name, alter in (("tokenizer", change), ("tokenizer_config", plain)):
        path = folder / f"{name}.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        alter(content)
        path.write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(str(folder))


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
    ("kind", "change"),
    [
        ("llama2", adds_end),
        ("llama2", metaspace),
        ("llama3", lower_case),
        ("llama2", added("<tool>", lstrip=True, rstrip=True)),
        ("llama2", added("the")),  # the text after it begins with a "▁" of its own
        ("llama3", added(".", rstrip=True)),
        ("smollm2", joined_words),
    ],
)
def test_prompts_of_changed_tokenizers(kind, change, stand_ins, tmp_path):
    tokenizer = changed(stand_ins[kind], tmp_path / "changed", change)
    for example in examples(seed=1, count=60):
        for limit in (20, 150):
            expected = plain_truncation(tokenizer, example.prompt, limit)
            assert encode_prompt(tokenizer, example, limit) == expected


# ------------------------------------------------------------------------------------------------ the script


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_encodes_leaves_nothing(number, ready):
    with open(ready / "many.jsonl", "w", encoding="utf-8") as file:
        some = [json.dumps({"article": text, "highlights": "short"}) + "\n" for text in texts(seed=2, count=100)]
        file.writelines(some * 200)
    before = contents(ready)
    process = start(PREPARE, "--dataset-name-or-path", "many.jsonl", "--save-path", "new.pt", cwd=ready)
    deadline = time.time() + TIMEOUT
    while not any(path.stat().st_size for path in ready.glob(".new.pt.*/train.ids")) and time.time() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number) or process.returncode == 130
    assert "Traceback" not in err and err.splitlines()[-1].startswith("Interrupted"), err
    assert contents(ready) == before


def test_an_error_in_a_late_row_is_one_line(ready, warm):
    rows = [{"article": "a", "highlights": "b"}] * 3000 + [{"article": "a"}]
    (ready / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = warm(PREPARE, "--dataset-name-or-path", "many.jsonl", "--save-path", "new.pt", cwd=ready, ok=None)
    tells(done, "highlights")
    assert not (ready / "new.pt").exists()


def test_columns_of_other_names(ready, warm):
    rows = [{"글": row["article"], "요약": row["highlights"]} for row in rows_of("train")]
    (ready / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (ready / "theirs.jsonl").write_text("\n".join(map(json.dumps, rows_of("train"))))
    words = ["--columns", "article=글", "highlights=요약"]
    warm(PREPARE, "--dataset-name-or-path", "mine.jsonl", "--save-path", "a.pt", *words, cwd=ready)
    warm(PREPARE, "--dataset-name-or-path", "theirs.jsonl", "--save-path", "b.pt", cwd=ready)
    one, other = (torch.load(ready / name) for name in ("a.pt", "b.pt"))
    assert one["meta"]["sha256"] == other["meta"]["sha256"]
    done = warm(PREPARE, "--dataset-name-or-path", "mine.jsonl", "--columns", "article=text", cwd=ready, ok=None)
    tells(done, "--columns article=text", "'text'", "글, 요약")
    for wrong in ("article", "article=", "=글"):
        tells(warm(PREPARE, "--columns", wrong, cwd=ready, ok=None), f"--columns {wrong}", "NAME=COLUMN")


@pytest.mark.parametrize(
    "script, data, measure",
    [
        ("gpt", "dataset/samples/Evol-Instruct-Python-26k", "code"),
        ("mistral", "dataset/samples/python_code_instructions_18k_alpaca/", "code"),
        ("llama2", "dataset/samples/cnn_dailymail/validation.jsonl", "summary"),
        ("llama3_1", "dataset/samples/korean_safe_conversation", "text"),
        ("smollm2", "mine.jsonl", "text"),
        pytest.param("smollm2", "standard-library", "code", marks=pytest.mark.slow),
    ],
)
def test_how_answers_are_judged_follows_from_the_data(script, data, measure, ready, warm):
    """And not from the template."""
    (ready / "mine.jsonl").write_text('{"instruction": "질문", "output": "답"}\n', encoding="utf-8")
    words = f"--model-name-or-path ./llama3-8b --dataset-name-or-path {data} --save-path new.pt"
    warm(f"python dataset/prepare_{script}_dataset.py {words}", cwd=ready)
    assert torch.load(ready / "new.pt")["meta"]["measure"] == measure


def test_rows_are_shown_as_the_model_will_see_them(ready, warm):
    words = ["--dataset-name-or-path", SAMPLE, "--show", "2", "--save-path", "new.pt"]
    said = warm(PREPARE, *words, cwd=ready).stdout
    assert said.count("--- row ") == 2 and "in brackets" in said
    for row in rows_of("train")[:2]:
        assert f"[{row['highlights'].splitlines()[0][:40]}" in said
    assert "<|begin_of_text|>[SUMMARIZE]" in said and "<|end_of_text|>]" in said
    assert (ready / "new.pt").is_file()
