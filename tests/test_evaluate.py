"""The evaluation: its measures by hand-made answers, and whole runs on stand-ins, before and after a short training."""

from __future__ import annotations

import json
import math
import re
import sys
import unicodedata

import pytest
import torch

from common.batches import Batches
from common.tokenization import load_tokenizer
from dataset.scores import code, summary, text
from model.generate import generate_answers, perplexity
from model.load import load_model
from model.tiny import write_tiny
from tests import terminal
from tests.conftest import environment
from tests.helpers import answer_start, change_dataset, contents, no_rows, rows_of, save_pissa, split_of, tells
from tests.test_training import CPU

EVALUATE = "python tutorial/evaluate.py --rows 4 --batch-rows 3 --max-new-tokens 6"
TRAIN = "--batch-size 8 --max-train-steps 2 --lr 1e-3 --eval-rows 4"
ROUGE = [f"ROUGE-{n} (F1, %)" for n in "12L"]
CODE = ["Parses (%)", "Defines what was asked (%)"]
PERPLEXITY, ENDED = "Perplexity (lower is better)", "Ends by itself (%)"
CHRF = "chrF (letters, %)"
TEXT = ["Exact match (%)", "Exact without spaces (%)", CHRF]

# ------------------------------------------------------------------------------------------------ code

FUNCTION = "def add(a, b):\n    return a + b"
CLASS = "class Stack:\n    def push(self, item):\n        self.items.append(item)"


def scores(answer, reference=FUNCTION, prompt="Add two numbers."):
    found = code([prompt], [reference], [answer])
    return tuple(found[name][0] if name in found else None for name in CODE)


@pytest.mark.parametrize(
    "answer, parses, defines",
    [
        (FUNCTION, 100, 100),
        ("def plus(x, y):\n    return x + y", 100, 100),  # the prompt gives no name
        ("async def add(a, b):\n    return a + b", 100, 100),
        ("import math\n\n@cached\ndef add(a, b):\n    return a + b\n\nprint(add(1, 2))", 100, 100),
        ("add = lambda a, b: a + b", 100, 0),
        (CLASS, 100, 0),
        ("if True:\n    def add(a, b):\n        return a + b", 100, 0),  # not at the top level
        ("def add(a, b):\n    return a +", 0, 0),
        ("Add the two numbers and return them.", 0, 0),
        ("", 0, 0),
        ("# a comment is no code", 0, 0),
        ("def add(a, b):\n    return '\0'", 0, 0),
        ("(" * 300 + ")" * 300, 0, 0),
        (f"Here it is:\n\n```python\n{FUNCTION}\n```\nIt adds.", 100, 100),
        (f"```\n{FUNCTION}\n```", 100, 100),
        (f"```python\n{FUNCTION}", 100, 100),  # cut before its end
        (f"```bash\npip install it\n```\n\n```py\n{FUNCTION}\n```", 100, 100),
        ("```text\nno code\n```", 0, 0),
    ],
)
def test_what_parses_and_what_defines(answer, parses, defines):
    assert scores(answer) == (parses, defines)


@pytest.mark.parametrize(
    "prompt",
    [
        "Add them.\n\n### Input:\ndef add(a, b):\n\n### Output:\n",
        "Write a function add that adds.",
        "Write a function called `add`.",
        "It is named 'add'",
        "add(1, 2) gives 3",
        "Write `add`.",
    ],
)
def test_a_name_in_the_prompt_is_asked_for(prompt):
    assert scores(FUNCTION, prompt=prompt) == (100, 100)
    assert scores("def plus(a, b):\n    return a + b", prompt=prompt) == (100, 0)


def test_a_word_that_is_also_the_name_is_not_a_name():
    assert scores("def plus(a, b):\n    return a + b", prompt="Write a function to add up; then add more") == (100, 100)


def test_all_names_of_the_prompt_are_asked_for():
    both, prompt = FUNCTION + "\n\n\n" + CLASS, "Write def add(a, b) and a class Stack."
    assert scores(both, both, prompt) == (100, 100)
    assert scores(CLASS, both, prompt) == (100, 0)
    assert scores("class add: pass\ndef Stack(): pass", both, prompt) == (100, 0)


def test_a_reference_that_was_cut_still_asks_and_a_script_does_not():
    assert scores(FUNCTION, FUNCTION + " +") == (100, 100)
    assert scores("a + b", FUNCTION + " +") == (100, 0)
    assert scores("print(3)", "print(1 + 2)") == (100, None)
    assert scores(CLASS, f"Like this:\n```python\n{CLASS}\n```") == (100, 100)


def test_an_answers_own_warnings_are_not_shown(recwarn):
    assert scores(r'"\d" is 3') == (100, 0)
    assert not [warning for warning in recwarn.list if "escape" in str(warning.message)]


# ------------------------------------------------------------------------------------------------ summaries


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("Police killed the gunman.", (100, 100, 100)),
        ("the gunman police killed", (100, 200 / 3, 50)),  # of the paper, section 3.1
        ("the gunman kill police", (100, 100 / 3, 50)),  # the paper's, and "killed" has the same stem
        ("The police", (200 / 3, 0, 100 / 3)),  # precision 1 and recall 1/2; one word in order
        ("A dog barked", (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_rouge_of_the_paper(answer, expected):
    pytest.importorskip("rouge_score")
    found = summary(["any prompt"], ["police killed the gunman"], [answer])
    assert [*found] == ROUGE
    assert tuple(score for score, _ in found.values()) == pytest.approx(expected)


KOREAN = ["정부는 오늘 새 법안을 냈다.", "경찰이 범인을 잡았다."]


@pytest.mark.parametrize(
    "answers, expected",
    [
        (KOREAN, (100, 100, 100)),
        ([unicodedata.normalize("NFD", text) for text in KOREAN], (100, 100, 100)),
        (["정부는 어제 새 법안을 냈다", "고양이"], (40, 25, 40)),  # 4 of 5 words and 2 of 4 pairs; nothing
        (["", "..."], (0, 0, 0)),
    ],
)
def test_rouge_of_korean(answers, expected):
    pytest.importorskip("rouge_score")
    assert [score for score, _ in summary(KOREAN, KOREAN, answers).values()] == pytest.approx(expected)


def test_rouge_of_english_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"], True)
    rows = [(row["highlights"], row["article"][:400]) for row in rows_of("validation")]
    found = summary(*zip(*(("", *row) for row in rows)))
    for name, kind in zip(ROUGE, scorer.rouge_types):
        each = [100 * scorer.score(*row)[kind].fmeasure for row in rows]
        assert found[name] == (pytest.approx(sum(each) / len(each)), len(rows))


# ------------------------------------------------------------------------------------------------ any other text


@pytest.mark.parametrize(
    "reference, answer, expected",
    [
        ("비가 와요.", "비가 와요.", 100),
        ("비가 와요.", "비 가와요.\n", 100),  # white space apart
        ("비가 와요.", "", 0),
        ("비가 와요.", "맑네", 0),
        ("ab", "ac", 25),  # of letters 1/2, of pairs none: 1/4 on average, of what is right and of what is found
        # all that is said is right; found are 2 of 4 letters and 1 of 3 pairs, 5/12, which count four times as much
        ("가나다라", "가나", 100 * 5 * 5 / 12 / (4 + 5 / 12)),
        ("가나", "가나다라", 100 * 5 * 5 / 12 / (4 * 5 / 12 + 1)),
    ],
)
def test_chrf_of_the_paper(reference, answer, expected):
    pytest.importorskip("sacrebleu")
    found = text(["any prompt"], [reference], [answer])
    assert [*found] == TEXT
    assert found[CHRF] == (pytest.approx(expected), 1)


def test_chrf_is_over_all_answers_together():
    sacrebleu = pytest.importorskip("sacrebleu")
    references, answers = ["비가 와요.", "가나다라마바사"], ["비가 와요.", "가나"]
    right = sacrebleu.corpus_chrf(answers, [references]).score
    assert text(["", ""], references, answers)[CHRF] == (pytest.approx(right), 2)
    each = [sacrebleu.sentence_chrf(answer, [reference]).score for answer, reference in zip(answers, references)]
    assert right != pytest.approx(sum(each) / 2)


@pytest.mark.parametrize(
    "answer, matches, letters",
    [
        ("비가 와요.", True, True),
        ("  비가\n\n와요.\u3000", True, True),
        (unicodedata.normalize("NFD", "비가 와요."), True, True),
        ("비가와요.", False, True),
        (unicodedata.normalize("NFD", "비 가 와 요."), False, True),
        ("비가 와요", False, False),
        ("", False, False),
    ],
)
def test_exact_match(answer, matches, letters):
    pytest.importorskip("sacrebleu")
    found = text(["", ""], ["비가 와요.", "a"], [answer, "A"])
    assert [found[name] for name in TEXT[:2]] == [(50.0 * matches, 2), (50.0 * letters, 2)]


# ------------------------------------------------------------------------------------------------ answers


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model") / "gpt")
    write_tiny("gpt", path)
    return load_model(path, torch.device("cpu")).eval(), load_tokenizer(path)


def test_perplexity_does_not_depend_on_the_batches(stand_in):
    model, tokenizer = stand_in
    prompts = [tokenizer(text)["input_ids"] for text in ("The fox", "A much longer question about a hen house", "Why")]
    lengths = torch.tensor([0, *(len(prompt) + 1 for prompt in prompts)])
    ids = torch.tensor([id for prompt in prompts for id in (*prompt, tokenizer.eos_token_id)])
    split = split_of(ids, lengths.cumsum(0), lengths[1:] - 1)
    found = [perplexity(model, Batches(split, rows, 200), 3, CPU) for rows in (1, 2, 3)]
    assert found == [pytest.approx(found[0])] * 3


def test_an_answer_does_not_depend_on_the_others_of_its_batch(stand_in):
    model, tokenizer = stand_in
    prompts = [tokenizer(text)["input_ids"] for text in ("The fox", "A much longer question about a hen house", "Why")]
    together = generate_answers(model, tokenizer, prompts, 8)
    assert together == [generate_answers(model, tokenizer, [prompt], 8)[0] for prompt in prompts]
    assert len(set(together)) == 3 and not any(ended for _, ended in together)


def test_which_answers_ended(stand_in, monkeypatch):
    model, tokenizer = stand_in
    end, (word, *_) = tokenizer.eos_token_id, tokenizer("house")["input_ids"]
    output = torch.tensor([[5, 5, word, end, end], [6, 7, word, word, word], [6, 7, end, end, end]])
    monkeypatch.setattr(model, "generate", lambda **_: output, raising=False)
    text = tokenizer.decode([word])
    assert generate_answers(model, tokenizer, [[5], [6, 7], [6, 7]], 3) == [(text, True), (3 * text, False), ("", True)]


# ------------------------------------------------------------------------------------------------ whole runs


def held_out_losses(folder):
    lines = (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["held_out_loss"] for record in map(json.loads, lines) if "held_out_loss" in record]


def check(done, folder, saved, names, dataset):
    """The table, the file and the picture of an evaluation, and its perplexity by the training's own log."""
    report = json.loads((folder / saved / "evaluation.json").read_text(encoding="utf-8"))
    measures = report["measures"]
    assert list(measures) == [*names, PERPLEXITY, ENDED]
    before, *_, after = held_out_losses(folder / saved)
    found = measures[PERPLEXITY]
    # the training has its weights in float32, the answers are made in 16 bit where the device has them
    assert found == {"before": pytest.approx(math.exp(before), rel=0.02), "rows": 4,
                     "after": pytest.approx(math.exp(after), rel=0.02)}  # fmt: skip
    assert found["after"] < found["before"]
    for name, values in measures.items():
        digits = 2 if name == PERPLEXITY else 1
        before, after = (f"{values[when]:.{digits}f}" for when in ("before", "after"))
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert line[len(name) :].split() == [before, after, str(values["rows"])]
    assert done.stdout.splitlines()[-1] == f"Saved in {saved}: evaluation.json, evaluation.png"
    assert (folder / saved / "evaluation.png").read_bytes()[:4] == b"\x89PNG"

    assert len(report["answers"]) == 4
    rows = torch.load(folder / dataset)["validation"]
    base = json.loads((folder / saved / "run.json").read_text(encoding="utf-8"))["options"]["model_name_or_path"]
    tokenizer = load_tokenizer(str(folder / base))
    for row, answers in enumerate(report["answers"]):  # in the order of the file, though they were asked by length
        ids = rows["input_ids"][rows["offsets"][row] : rows["offsets"][row + 1]].tolist()
        start = answer_start(rows, row)
        decoded = [tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], ids[start:])]
        assert [answers["prompt"], answers["reference"]] == [decoded[0], decoded[1].strip()]
        assert [type(answers[when]) for when in ("before", "after")] == [str, str]
    for place, when in enumerate(("before", "after")):
        ended = [answers["ended"][place] for answers in report["answers"]]
        assert 100 * sum(ended) / 4 == measures[ENDED][when]
    # all four side by side; of one line, with a word that says whether the answer is right
    assert done.stdout.count("Answer in the data") == 4
    assert [answers["prompt"].split()[2] in done.stdout for answers in report["answers"]] == [True] * 4
    return report


def test_summaries(ready, warm):
    pytest.importorskip("rouge_score")
    warm(f"python tutorial/train_llama3.py {TRAIN}", cwd=ready)
    command, saved = f"{EVALUATE} --model-name-or-path ./llama3_summarization", ready / "llama3_summarization"
    made = contents(ready)
    done = warm(command, cwd=ready)
    report = check(done, ready, "./llama3_summarization", ROUGE, "llama3_dataset.pt")
    new = {path: hash for path, hash in contents(ready).items() if made.get(path) != hash}
    assert set(new) == {f"llama3_summarization/evaluation.{kind}" for kind in ("json", "png")}

    (saved / "run.json").unlink()  # a model of another tool: all is said by options; and the same numbers come again
    options = "--base-model-name-or-path ./llama3-8b --dataset-name-or-path ./llama3_dataset.pt --save-dir ./a/b"
    warm(f"{command} {options}", cwd=ready)
    again = json.loads((ready / "a" / "b" / "evaluation.json").read_text(encoding="utf-8"))
    assert (again["measures"], again["answers"]) == (report["measures"], report["answers"])


def test_code(folder, warm):
    """The defaults are those of SmolLM2."""
    warm("python tutorial/download_smollm2.py --tiny", cwd=folder)
    sample = "dataset/samples/python_code_instructions_18k_alpaca"
    warm(f"python dataset/prepare_smollm2_dataset.py --dataset-name-or-path {sample}", cwd=folder)
    warm(f"python tutorial/train_smollm2.py {TRAIN}", cwd=folder)
    done = warm(EVALUATE, cwd=folder)
    report = check(done, folder, "./smollm2_korean_numbers", CODE, "smollm2_dataset.pt")
    assert report["measures"][CODE[1]]["rows"] == 3  # the third is a script, without a function


def test_kinds_of_rows(folder, warm):
    """A column `kind` goes into the dataset file, and the exact answers are counted by it; wrong answers come first."""
    pytest.importorskip("sacrebleu")
    warm("python tutorial/download_smollm2.py --tiny", cwd=folder)
    kinds = ["", "odd"] * 20
    rows = [{"instruction": f"{number}번", "output": "삼 번", "kind": kind} for number, kind in enumerate(kinds)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = warm("python dataset/prepare_smollm2_dataset.py --dataset-name-or-path mine.jsonl", cwd=folder)
    assert "Columns not used" not in done.stdout
    assert torch.load(folder / "smollm2_dataset.pt")["meta"]["kinds"] == ["odd", "odd"]  # of rows 20 and 40
    warm("python tutorial/train_smollm2.py --epochs 12 --lr 1e-2 --eval-rows 2", cwd=folder)  # all answers are the same
    done = warm(f"{EVALUATE} --rows 2", cwd=folder)
    report = json.loads((folder / "smollm2_korean_numbers" / "evaluation.json").read_text(encoding="utf-8"))
    assert report["kinds"] == {"odd": {"before": 0, "after": 2, "rows": 2}}
    assert re.search(r"(?m)^Exact by kind +Before +After +Rows\n-+\nodd +0 +2 +2$", done.stdout)
    assert re.search(r"(?m)^right +19번\nBefore +.*\nAfter +삼 번\nAnswer in the data +삼 번$", done.stdout)

    rows = [{"instruction": f"{number}번", "output": "사 번", "kind": "other"} for number in range(20)]
    rows[3]["output"] = "삼 번"
    for name, part in (("train", rows), ("validation", rows[:6])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    warm("python dataset/prepare_smollm2_dataset.py --dataset-name-or-path . --save-path other.pt", cwd=folder)
    done = warm(f"{EVALUATE} --dataset-name-or-path ./other.pt --save-dir . --show 3", cwd=folder)
    assert re.findall(r"(?m)^(right|WRONG) +(\d)번$", done.stdout) == [("WRONG", "0"), ("WRONG", "1"), ("right", "3")]
    assert json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["kinds"]["other"]["after"] == 1


def test_an_adapter_on_korean(ready, warm):
    """One model in memory, asked without the adapter and with it."""
    pytest.importorskip("peft")
    pytest.importorskip("sacrebleu")
    # on Llama3's stand-in: the oldest transformers that is tested doesn't know Llama 3.1
    model, sample = "--model-name-or-path ./llama3-8b", "dataset/samples/korean_safe_conversation"
    warm(f"python dataset/prepare_llama3_1_dataset.py {model} --dataset-name-or-path {sample}", cwd=ready)
    warm(f"python tutorial/train_llama3_1.py {model} {TRAIN} --no-quantization", cwd=ready)
    done = warm(f"{EVALUATE} --model-name-or-path ./llama3_1_korean", cwd=ready)
    check(done, ready, "./llama3_1_korean", TEXT, "llama3_1_dataset.pt")
    done = warm(f"{EVALUATE} --model-name-or-path ./llama3_1_korean --show 0", cwd=ready)
    assert "Answer in the data" not in done.stdout


def test_another_measure_and_other_rows(trained, warm):
    """--measure; and the file that was prepared again with a row at the top: other rows are held out now."""
    pytest.importorskip("sacrebleu")
    command = f"{EVALUATE} --model-name-or-path ./trained --measure text"
    lines = warm(command, cwd=trained).stdout.splitlines()
    report = json.loads((trained / "trained" / "evaluation.json").read_text(encoding="utf-8"))
    assert list(report["measures"]) == [*TEXT, PERPLEXITY, ENDED]
    assert lines.index("./trained, held-out rows of ./llama3_dataset.pt:") == len(lines) - 9  # the answers stand above
    earlier = {"options": {}, "dataset": {"sha256": "of another file"}}  # of a training in two stages
    (trained / "llama3-8b" / "run.json").write_text(json.dumps(earlier), encoding="utf-8")
    learned = "./trained, rows of ./llama3_dataset.pt (which it may have learned from another file):"
    assert learned in warm(command, cwd=trained).stdout
    run = json.loads((trained / "trained" / "run.json").read_text(encoding="utf-8"))
    run["dataset"]["sha256"]["train"]["input_ids"] = "of other rows"
    (trained / "trained" / "run.json").write_text(json.dumps(run), encoding="utf-8")
    tells(warm(command, cwd=trained, ok=None), "./llama3_dataset.pt has changed since the training", "Prepare")
    (trained / "llama3_dataset.pt").rename(trained / "other.pt")
    done = warm(f"{command} --dataset-name-or-path ./other.pt", cwd=trained)
    assert learned.replace("llama3_dataset", "other") in done.stdout


def test_an_adapter_that_changes_its_base(ready, warm):
    """PiSSA: without the adapter the model is not the base. What is right comes from plain transformers and peft."""
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(ready / "llama3-8b").float().eval()
    split = torch.load(ready / "llama3_dataset.pt")["validation"]
    loss, labels = 0, 0
    for row in range(4):
        ids = split["input_ids"][split["offsets"][row] : split["offsets"][row + 1]].long()
        start = answer_start(split, row)
        with torch.no_grad():
            logits = base(input_ids=ids[None]).logits[0, start - 1 : -1]
        loss += torch.nn.functional.cross_entropy(logits, ids[start:], reduction="sum").item()
        labels += len(ids) - start
    save_pissa(base, ready / "pissa")
    load_tokenizer(str(ready / "llama3-8b")).save_pretrained(ready / "pissa")
    words = "--model-name-or-path ./pissa --dataset-name-or-path ./llama3_dataset.pt --max-new-tokens 6"
    pytest.importorskip("rouge_score")
    base_of = "--base-model-name-or-path ./llama3-8b"
    warm(f"python tutorial/evaluate.py {words} {base_of} --rows 4", cwd=ready)
    report = json.loads((ready / "pissa" / "evaluation.json").read_text(encoding="utf-8"))
    assert report["measures"][PERPLEXITY]["before"] == pytest.approx(math.exp(loss / labels), rel=0.002)
    done = warm(f"python tutorial/compare_adapter.py {words} --rows 4", cwd=ready)
    assert re.findall(r"--- Base ---\n(.*)\n--- Adapter ---\n(.*)\n", done.stdout) == [
        (row["before"], row["after"]) for row in report["answers"]
    ]
    # A prompt is not cut: its end is the template's own text.
    done = warm(f"python tutorial/compare_adapter.py {words.replace(' 6', ' 8190')}", cwd=ready, ok=None)
    tells(done, "--max-new-tokens 8190 leaves no room for the longest prompt")


# ------------------------------------------------------------------------------------------------ a reader's mistakes


@pytest.fixture
def trained(ready):
    """As if ./trained had been trained on ./llama3-8b."""
    (ready / "llama3-8b").rename(ready / "trained")
    write_tiny("llama3", ready / "llama3-8b")
    options = {"model_name_or_path": "./llama3-8b", "dataset_name_or_path": "./llama3_dataset.pt"}
    run = {"options": options, "dataset": torch.load(ready / "llama3_dataset.pt")["meta"]}
    (ready / "trained" / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return ready


@pytest.mark.slow
def test_bars_on_a_terminal(trained):
    """Of the answers, and of the tokens of the batch under way; the scores come last."""
    pytest.importorskip("sacrebleu")
    words = f"{EVALUATE} --model-name-or-path ./trained --measure text --show 1".split()[1:]
    env = environment(HF_HOME=str(trained / ".hf_home"))
    status, text = terminal.run([sys.executable, *words], [], trained, env)
    assert status == 0, text
    for when in ("before", "after"):
        assert re.search(rf"{when}: +0%\|.*0/4", text) and re.search(rf"{when}: 100%\|.*4/4 .*(row/s|s/row)\]", text)
    assert re.search(r"tokens: .*/6 .*token", text) and "perplexity: " in text
    assert text.index("--- Before ---") < text.index("Exact match: ") < text.index("\nExact match (%)")


@pytest.fixture
def refused(trained, warm):
    def check(*words, tells_of):
        before = contents(trained)
        tells(warm(f"{EVALUATE} --model-name-or-path ./trained", *words, cwd=trained, ok=None), *tells_of)
        assert contents(trained) == before

    return check


def test_no_held_out_rows(trained, refused):
    change_dataset(trained / "llama3_dataset.pt", lambda document: document.update(validation=no_rows()))
    refused(tells_of=["llama3_dataset.pt", "no held-out rows", "Prepare"])


def test_a_dataset_of_another_tokenizer(trained, refused):
    change_dataset(trained / "llama3_dataset.pt", lambda document: document["meta"].update(tokenizer="of another"))
    refused(tells_of=["llama3_dataset.pt", "another tokenizer"])


@pytest.mark.parametrize("text", [None, "not json", "[]", '{"options": {}}'])
def test_an_unknown_base(text, trained, refused):
    run_json = trained / "trained" / "run.json"
    run_json.unlink() if text is None else run_json.write_text(text, encoding="utf-8")
    refused(tells_of=["./trained", "run.json", "--base-model-name-or-path"])
    if text is None:
        refused("--base-model-name-or-path", "./llama3-8b", tells_of=["run.json", "--dataset-name-or-path"])


def test_a_base_that_is_not_there_or_of_another_tokenizer(trained, refused):
    refused("--base-model-name-or-path", "./nowhere", tells_of=["./nowhere", "does not exist", "--base-model"])
    write_tiny("smollm2", trained / "smollm2-135m")
    refused("--base-model-name-or-path", "./smollm2-135m", tells_of=["./smollm2-135m", "another tokenizer", "--base"])


@pytest.mark.parametrize(
    "words, tells_of",
    [
        (["--model-name-or-path", "./missing"], ["./missing", "does not exist"]),
        (["--dataset-name-or-path", "./missing.pt"], ["./missing.pt", "--dataset-name-or-path"]),
        (["--max-new-tokens", "8190"], ["--max-new-tokens 8190", "prompt"]),
        (["--save-dir", "llama3_dataset.pt"], ["llama3_dataset.pt is a file", "--save-dir"]),
        (["--rows", "0"], ["--rows"]),
    ],
)
def test_other_mistakes(words, tells_of, refused):
    refused(*words, tells_of=tells_of)
