"""A file of prompts: each row answered as --prompt answers it, cut anywhere and gone on with, refused in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from argparse import Namespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import common.train_log
from common.support.exit import UserError
from common.tokenization import Example, load_tokenizer
from dataset.questions import load_questions
from dataset.templates import alpaca, chat
from model.generate import AnswerStreamer, answer_questions, decode, stream_answer
from model.load import load_model
from tests.conftest import ROOT, TIMEOUT, lay_out, start
from tests.helpers import KINDS, SCRIPTS, contents, tells
from tests.test_full_memory import WITH
from tests.test_training import CPU

ASK = "python tutorial/inference_llama3_1.py --model-name-or-path ./trained --max-new-tokens 40"
FILE = f"{ASK} --prompt-file questions.jsonl --save-path answers.jsonl --batch-rows 2"
UNTRAINED = f"{SCRIPTS['inference']} --prompt-file questions.jsonl --save-path answers.jsonl"
KNOWN = {
    "하늘의 색은?": "파랗습니다.",
    "눈은 무슨 색입니까?": "하얗습니다.",
    "풀의 색을 한 단어로 말해 주세요.": "초록.",
}
LONG = "그림자 속의 눈 " * 8
MEMORIZE = "--batch-size 16 --max-train-steps 60 --lr 6e-3 --lr-scheduler linear --warmup-steps 5 --log-interval 30"


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def lines(path):
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.splitlines()]


# ------------------------------------------------------------------------------------------------ as --prompt answers


class Asked(Namespace):
    """The options that a script would have."""

    def __init__(self, directory, folder, **more):
        usual = {
            "model_name_or_path": str(directory),
            "max_new_tokens": 12,
            "temperature": 0.0,
            "seed": 0,
            "bits": None,
        }
        files = {"prompt_file": str(folder / "questions.jsonl"), "save_path": str(folder / "answers.jsonl")}
        super().__init__(**usual, **files, batch_rows=3, columns={}, **more)


TEXTS = (
    "A fox",
    "Why does the hen house have two doors, one of which is closed at night?",
    "한글 👍",
    "x" * 90,
    "A fox",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_answers_as_prompts_one_at_a_time(kind, stand_ins, tmp_path, capsys):
    """In float32, on each architecture; rows that are alike have the same answer each."""
    directory = stand_ins[kind]
    tokenizer, model = load_tokenizer(str(directory)), load_model(str(directory), torch.device("cpu"))
    write(tmp_path / "questions.jsonl", [{"n": number, "prompt": text} for number, text in enumerate(TEXTS)])
    args, question = Asked(directory, tmp_path), {"instruction": "", "output": ""}
    questions = load_questions(args, alpaca, {**question, "instruction": "own"})
    answer_questions(model, tokenizer, questions.encode(tokenizer, args), questions.answers, args, CPU)
    alone = Namespace(**{**vars(args), "save_path": None})
    for answer, (number, text) in zip(lines(tmp_path / "answers.jsonl"), enumerate(TEXTS)):
        one = load_questions(alone, alpaca, {**question, "instruction": text}).encode(tokenizer, alone)[0]
        said = stream_answer(model, tokenizer, one, args.max_new_tokens, 0.0)
        printed = capsys.readouterr().out
        cut = "(stopped at --max-new-tokens 12)\n"
        ended = not printed.endswith(cut)
        assert printed[: None if ended else -len(cut)].endswith(f"\n{said}\n")
        assert answer == {"n": number, "prompt": text, "answer": said, "ended": ended}


CODE = "def f(xs):\n    for n in xs:\n        if n != 1 :\n            print('뷁쀍 👍👎 !')\n    return  n"


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_streamed_letter_for_letter(kind, stand_ins):
    """Wherever it is cut: spaces at the beginning of a line, before a mark, and no half letter."""
    tokenizer = load_tokenizer(str(stand_ins[kind]))
    tokenizer.clean_up_tokenization_spaces = True  # as Llama 3's own file has it
    ids = tokenizer.encode(CODE, add_special_tokens=False)
    pieces = []
    streamer = AnswerStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([ids]))  # the prompt
    for number, token in enumerate(ids, 1):
        streamer.put(torch.tensor([token]))
        text = "".join(pieces)
        assert CODE.startswith(text) and text == decode(tokenizer, ids[:number])
    assert text == CODE


def test_a_model_that_reads_padding_is_asked_one_at_a_time(ready, warm):
    """RWKV has no attention mask: in a batch it would read the padding before a shorter prompt as text."""
    tokenizer = load_tokenizer(str(ready / "llama3-8b"))
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "rwkv", vocab_size=len(tokenizer), hidden_size=32, attention_hidden_size=32, num_hidden_layers=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(ready / "rwkv")
    tokenizer.save_pretrained(ready / "rwkv")
    write(ready / "questions.jsonl", [{"prompt": "하늘"}, {"prompt": "x" * 50}, {"prompt": "A fox"}])
    found = []
    for rows in (1, 3):
        save_path = f"./answers{rows}.jsonl"
        words = f"--prompt-file questions.jsonl --save-path {save_path} --batch-rows {rows} --max-new-tokens 8"
        warm(f"python tutorial/inference_llama3.py --model-name-or-path ./rwkv {words}", cwd=ready)
        found.append(lines(ready / save_path))
    assert found[0] == found[1] and all(row["answer"] for row in found[0])


def test_sampled_answers_are_those_of_the_seed(stand_ins, tmp_path):
    directory = stand_ins["gpt"]
    tokenizer, model = load_tokenizer(str(directory)), load_model(str(directory), torch.device("cpu"))
    write(tmp_path / "questions.jsonl", [{"prompt": text} for text in TEXTS])
    found = []
    for temperature, seed in ((2.0, 1), (2.0, 1), (2.0, 2), (0.0, 1)):
        args = Asked(directory, tmp_path)
        args.temperature = temperature
        for path in tmp_path.glob("answers.*"):
            path.unlink()
        torch.manual_seed(seed)
        questions = load_questions(args, alpaca, {"instruction": "own", "output": ""})
        answer_questions(model, tokenizer, questions.encode(tokenizer, args), questions.answers, args, CPU)
        found.append(lines(tmp_path / "answers.jsonl"))
    assert found[0] == found[1] != found[2] and found[3] not in found[:3]


@pytest.fixture(scope="module")
def trained(base, warm, tmp_path_factory):
    """A folder in which a stand-in has learned three questions by heart, and a file that asks these and others."""
    folder = lay_out(tmp_path_factory.mktemp("trained") / "work")
    shutil.copytree(base / "llama3-8b", folder / "llama3-8b")
    rows = [{"instruction": question, "output": answer} for question, answer in KNOWN.items()]
    rows += [{"instruction": [*KNOWN][1], "input": LONG, "output": "회색."}]
    write(folder / "train.jsonl", rows * 16)
    model = "--model-name-or-path ./llama3-8b"
    warm(f"python dataset/prepare_llama3_1_dataset.py {model} --dataset-name-or-path train.jsonl", cwd=folder)
    data = "--dataset-name-or-path ./llama3_1_dataset.pt --eval-rows 0 --save-dir ./trained"
    warm(f"python tutorial/train_llama3.py {model} --block-size 2048 {data} {MEMORIZE}", cwd=folder)
    first, second, third = KNOWN
    rows = [{"id": 1, "instruction": first}, {"score": 1.5, "prompt": second, "tags": ["색", None], "big": 10**20}]
    rows += [{"instruction": third, "input": "", "output": "reference"}, {"instruction": first, "prompt": "not asked"}]
    write(folder / "questions.jsonl", [*rows, {"instruction": second, "input": LONG}])
    return folder


@pytest.fixture
def asks(trained, tmp_path):
    """A fresh folder with that model and that file."""
    folder = lay_out(tmp_path / "work")
    (folder / "trained").symlink_to(trained / "trained")
    shutil.copy(trained / "questions.jsonl", folder)
    return folder


@pytest.fixture(scope="module")
def never_cut_answers(trained, warm):
    warm(FILE, cwd=trained)
    return lines(trained / "answers.jsonl")


def test_a_file_of_prompts(trained, asks, warm):
    rows = lines(asks / "questions.jsonl")
    done = warm(FILE, cwd=asks)
    answers = lines(asks / "answers.jsonl")
    said = [*KNOWN.values(), "회색."]
    # its own fields as they were, in their order, then the answer
    assert [list(answer) for answer in answers] == [[*row, "answer", "ended"] for row in rows]
    assert [{name: answer[name] for name in row} for answer, row in zip(answers, rows)] == rows
    assert [(one["answer"], one["ended"]) for one in answers] == [(said[n], True) for n in (0, 1, 2, 0, 3)]
    assert done.stdout.splitlines()[-1] == "Saved 5 answers in answers.jsonl (5 ended with a stop token)"
    run = json.loads((asks / "answers.run.json").read_text(encoding="utf-8"))
    assert run["options"]["prompt_file"] == "questions.jsonl" and run["command"][0] == "tutorial/inference_llama3_1.py"
    for row in (0, 1):  # as --prompt
        text = rows[row].get("instruction") or rows[row]["prompt"]
        assert warm(ASK, "--prompt", text, cwd=asks).stdout.endswith(f"### output:\n\n{answers[row]['answer']}\n")

    before = contents(asks)
    done = warm(FILE, cwd=asks)
    assert done.stdout == "All 5 rows of questions.jsonl are answered in answers.jsonl.\n"  # and nothing was loaded
    assert contents(asks) == before


@pytest.mark.parametrize("name", ["questions.csv", "questions.json"])
def test_prompts_in_a_table_or_an_array(name, ready, warm):
    csv, array = "id,article\n7,The bridge will close.\n", '[{"id": 7, "article": "The bridge will close."}]'
    (ready / name).write_text(csv if name.endswith(".csv") else array)
    warm(f"{SCRIPTS['inference']} --prompt-file {name} --save-path answers.jsonl", cwd=ready)
    [answer] = lines(ready / "answers.jsonl")
    assert [*answer] == ["id", "article", "answer", "ended"] and answer["id"] in (7, "7")


def test_columns_of_prompts_are_named_as_in_preparing(never_cut_answers, asks, warm):
    rows = lines(asks / "questions.jsonl")
    questions = [row.get("instruction") or row["prompt"] for row in rows[:3]]
    (asks / "questions.csv").write_text("번호,질문\n" + "".join(f'1,"{one}"\n' for one in questions), encoding="utf-8")
    command = FILE.replace("questions.jsonl", "questions.csv")
    for name in ("prompt", "instruction"):
        warm(command.replace("answers", name), "--columns", f"{name}=질문", cwd=asks)
        answers = lines(asks / f"{name}.jsonl")
        assert [list(answer) for answer in answers] == [["번호", "질문", "answer", "ended"]] * 3
        assert [answer["answer"] for answer in answers] == [answer["answer"] for answer in never_cut_answers[:3]]
    done = warm(command, cwd=asks, ok=None)
    tells(
        done,
        "questions.csv, line 2 has none of the columns instruction, prompt; it has: 번호, 질문",
        "--columns prompt",
    )
    (asks / "prompt.jsonl").write_text("", encoding="utf-8")  # what was asked is another column now
    done = warm(command.replace("answers", "prompt"), "--columns", "prompt=번호", cwd=asks, ok=None)
    tells(done, "answers made with another value of: columns")


def test_a_second_writer_is_refused(asks, warm):
    """As soon as the first has begun, and while it still loads its model."""
    process = start(FILE, cwd=asks)
    end = time.monotonic() + TIMEOUT
    while not (asks / ".answers.jsonl.holder").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    try:
        done = warm(f"{FILE} --max-new-tokens 2", cwd=asks, ok=None)
    finally:
        process.send_signal(signal.SIGCONT)
    tells(done, f"answers.jsonl is locked by process {process.pid} on ", "writing answers", "another --save-path")
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0 and len(lines(asks / "answers.jsonl")) == 5
    assert sorted(path.name for path in asks.glob(".answers*")) == []


def test_what_is_cut_is_told(trained, tmp_path, warm):
    folder = lay_out(tmp_path / "work")
    (folder / "trained").symlink_to(trained / "trained")
    write(folder / "questions.jsonl", [{"prompt": question} for question in KNOWN])
    done = warm(f"{FILE} --max-new-tokens 1", cwd=folder)
    assert [answer["ended"] for answer in lines(folder / "answers.jsonl")] == [False] * 3
    assert "Saved 3 answers in answers.jsonl (0 ended with a stop token)" in done.stdout


def test_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(common.train_log, "SECONDS", 0)
    assert list(common.train_log.with_progress([[1, 2], [3]], len, "answers", 10, 7)) == [[1, 2], [3]]
    told = capsys.readouterr().out.splitlines()
    assert [re.sub(r"[\d.]+ rows/s", "", line) for line in told] == [
        "answers: 9 rows of 10, 0 minutes left, ",
        "answers: 10 rows of 10, 0 minutes left, ",
    ]


# ------------------------------------------------------------------------------------------------ cut, and gone on with

OTHERS = (signal.SIGTERM, signal.SIGKILL)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.slow) for number in OTHERS)]
)
def test_an_interrupt_loses_no_finished_answer(number, never_cut_answers, asks, warm):
    """And the same command answers the rest: what it writes is what a run writes that nothing has cut."""
    rows = lines(asks / "questions.jsonl") * 40
    write(asks / "questions.jsonl", rows)
    process = start(FILE, cwd=asks)
    path, seen, end = asks / "answers.jsonl", b"", time.monotonic() + TIMEOUT
    try:
        while seen.count(b"\n") < 50:
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.01)
            seen = path.read_bytes() if path.exists() else b""
        process.send_signal(number)
        _, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    left = lines(path)
    assert 50 <= len(left) < len(rows)
    assert {line for line in seen.splitlines() if line} <= {*path.read_bytes().splitlines()}
    if number != signal.SIGKILL:
        assert "Traceback" not in err
        assert err.splitlines()[-1] == "Interrupted. Run the same command again to continue.", err
        assert process.returncode
        assert all({**row, **one} == one for row, one in zip(rows, left))
    done = warm(FILE, cwd=asks)
    assert f"Continuing: {len(left)} of {len(rows)} rows are answered in answers.jsonl" in done.stdout.splitlines()
    assert lines(path) == never_cut_answers * 40


def test_half_a_line_and_lines_that_were_deleted_at_the_end_are_answered_again(never_cut_answers, asks, warm):
    warm(FILE, cwd=asks)
    path = asks / "answers.jsonl"
    whole = path.read_bytes()
    first, second, *_ = whole.splitlines(keepends=True)
    for left in (first + second[:-9], first + second, first[:-1], b"", whole[:-1]):
        path.write_bytes(left)
        warm(f"{FILE} --batch-rows 3", cwd=asks)  # which changes no answer
        assert path.read_bytes() == whole


def test_memory_that_gives_out_loses_no_complete_window(never_cut_answers, asks, warm):
    """Eight batches of two rows are saved together."""
    write(asks / "questions.jsonl", lines(asks / "questions.jsonl") * 4)
    again = "transformers.GenerationMixin.generate = full"
    once = "once, left = transformers.GenerationMixin.generate, [8]\n    def later(*a, **k):\n"
    once += "        if k['max_new_tokens'] == 3: return once(*a, **k)  # the question whether it reads padding\n"
    once += f"        left[0] -= 1\n        if not left[0]: {again}\n        return once(*a, **k)\n"
    once += "    transformers.GenerationMixin.generate = later"
    (asks / "with.py").write_text(WITH.replace(again, once))
    done = warm(FILE.replace("python ", "python with.py answering "), cwd=asks, ok=None)
    tells(done, "Out of memory", "To save memory, use --batch-rows, --load-in-4bit, --max-new-tokens.")
    assert len(lines(asks / "answers.jsonl")) == 16
    warm(f"{FILE} --batch-rows 1", cwd=asks)
    assert lines(asks / "answers.jsonl") == never_cut_answers * 4


def test_answers_are_resumed_after_a_full_disk(never_cut_answers, asks, warm):
    """By the system's own limit on the size of a file."""
    write(asks / "questions.jsonl", lines(asks / "questions.jsonl") * 10)
    command = FILE.replace("python ", f"python {ROOT}/tests/limited.py files 4000 ")
    tells(warm(command, cwd=asks, ok=None), "Cannot write", "File too large", "Free disk space")
    assert 2 < (asks / "answers.jsonl").read_bytes().count(b"\n") < 50
    warm(FILE, cwd=asks)
    assert lines(asks / "answers.jsonl") == never_cut_answers * 10


# ------------------------------------------------------------------------------------------------ a reader's mistakes


@pytest.fixture
def refused(ready, warm):
    """A function that asks with these rows, or lines, and must be refused before anything is loaded."""

    def check(rows, *words, tells_of, command=UNTRAINED, loaded=False):
        if isinstance(rows, bytes):
            (ready / "questions.jsonl").write_bytes(rows)
        elif rows is not None:
            write(ready / "questions.jsonl", rows)
        before = contents(ready)
        done = warm(command, *words, cwd=ready, ok=None)
        tells(done, *tells_of)
        assert contents(ready) == before
        assert ("Device" in done.stdout) == loaded and "Loading weights" not in done.stderr

    return check


GOOD = {"article": "The bridge will close."}


@pytest.mark.parametrize(
    "rows, words",
    [
        (None, ["questions.jsonl does not exist"]),
        (b"", ["questions.jsonl is empty"]),
        (b"\n \n", ["questions.jsonl is empty"]),
        (b'{"article": "a"}\n{"article": \n', ["questions.jsonl, line 2", "not valid JSON"]),
        (b'{"article": "a"}\n["b"]\n', ["questions.jsonl, line 2", "not a JSON object"]),
        (b'{"article": "caf\xe9"}', ["questions.jsonl, line 1", "not UTF-8"]),
        (
            [GOOD, {"instruction": "a"}],
            ["questions.jsonl, line 2", "none of the columns article, prompt", "instruction"],
        ),
        ([GOOD, {"article": ["a"]}], ["questions.jsonl, line 2", "column 'article' holds a list"]),
        ([GOOD, {"article": " "}], ["questions.jsonl, line 2", "article is empty"]),
        ([GOOD, {"prompt": None}], ["questions.jsonl, line 2", "prompt is empty"]),
        ([GOOD, {**GOOD, "answer": "mine"}], ["questions.jsonl", "already has a column 'answer'", "Rename it"]),
        ([{"messages": [{"role": "user", "content": "a"}]}], ["line 1", "none of the columns article", "messages"]),
    ],
)
def test_a_file_of_prompts_that_is_none(rows, words, refused):
    refused(rows, tells_of=words)


@pytest.mark.parametrize(
    "words, told",
    [
        ("--prompt a --prompt-file questions.jsonl --save-path b.jsonl", ["--prompt-file", "not allowed"]),
        ("--save-path b.jsonl", ["--save-path b.jsonl", "give --prompt-file"]),
        ("--prompt a --save-path b.jsonl", ["--save-path b.jsonl", "give --prompt-file"]),
        ("--prompt-file questions.jsonl", ["questions.jsonl has a prompt on each line", "--save-path"]),
        ("--prompt-file questions.txt --save-path b.jsonl", ["questions.txt", ".jsonl"]),
        ("--prompt-file . --save-path b.jsonl", [". is not a file", ".jsonl"]),
        ("--prompt-file questions.jsonl --save-path questions.jsonl", ["questions.jsonl exists, but"]),
        ("--prompt-file questions.jsonl --save-path ./llama3-8b/../questions.jsonl", ["questions.jsonl exists, but"]),
        ("--prompt-file questions.jsonl --save-path answers-1.5b", ["answers-1.5b", "a name that ends in .jsonl"]),
        ("--prompt-file questions.jsonl --columns article=글", ["--columns", "give --prompt-file and --save-path"]),
        ("--prompt-file questions.jsonl --save-path b.jsonl --columns article=글", ["line 1 has no column '글'"]),
        ("--prompt-file questions.jsonl --save-path b.jsonl --columns articel=article", ["asks for no 'articel'"]),
        ("--prompt-file questions.jsonl --save-path llama3_dataset.pt/a.jsonl", ["llama3_dataset.pt is a file"]),
        ("--prompt-file questions.jsonl --save-path b.jsonl --batch-rows 0", ["--batch-rows", "1 or more"]),
    ],
)
def test_options_that_do_not_go_together(words, told, refused):
    refused([GOOD], *words.split(), command=SCRIPTS["inference"], tells_of=told)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_place_where_nothing_may_be_written(ready, refused):
    (ready / "mine").mkdir(mode=0o555)
    refused([GOOD], "--save-path", "mine/answers.jsonl", tells_of=["is not writable", "--save-path"])


def test_a_prompt_that_is_longer_than_the_model_has_room_for(refused):
    """--prompt cuts it, as the training does; in a file it is told, and where."""
    rows = [GOOD, {"article": "bridge " * 9000}]
    words = [
        "questions.jsonl, line 2",
        "tokens",
        f"with --max-new-tokens 2 the model has room for {8192 - 2}",
        "Shorten it",
    ]
    refused(rows, tells_of=words, loaded=True)
    refused([GOOD], "--max-new-tokens", 8192, tells_of=["--max-new-tokens 8192 leaves no room"], loaded=True)


@pytest.mark.parametrize(
    "words, told",
    [
        (["--max-new-tokens", "3", "--seed", "1"], ["another value of: max_new_tokens, seed"]),
        (["--temperature", "0.5"], ["another value of: temperature"]),
        (["--no-quantization"], ["another value of: bits"]),
        (["--model-name-or-path", "./other"], ["another value of: model"]),
        (["--prompt-file", "others.jsonl"], ["another value of: prompts"]),
    ],
)
def test_answers_that_were_made_otherwise(words, told, ready, refused, warm):
    from model.tiny import write_tiny

    write(ready / "questions.jsonl", [GOOD, {"article": "b"}])
    write(ready / "others.jsonl", [GOOD, {"article": "c"}])
    warm(UNTRAINED, cwd=ready)
    path = ready / "answers.jsonl"
    path.write_text(path.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    if "./other" in words:
        write_tiny("gpt", ready / "other")
    refused(None, *words, tells_of=["answers.jsonl has answers made with", *told, "--save-path"])
    (ready / "llama3-8b").rename(ready / "moved")  # the same weights
    warm(UNTRAINED, "--model-name-or-path", "./moved", "--batch-rows", 1, cwd=ready)
    assert len(lines(path)) == 2


def test_a_file_that_is_no_file_of_answers(ready, refused, warm):
    write(ready / "questions.jsonl", [GOOD])
    (ready / "answers.jsonl").write_text("mine\n")
    refused(None, tells_of=["answers.jsonl exists, but", "answers.run.json", "--save-path"])
    (ready / "answers.run.json").write_text("damaged")
    refused(None, tells_of=["answers.jsonl exists, but", "answers.run.json", "--save-path"])


def test_a_template_of_the_readers_own(tmp_path):
    """Its first column is asked for, or `prompt` in its place; the others are those of the question."""

    def review(row):
        return Example(["평: ", row["review"], ", 별: ", row["stars"], row["more"]], row["label"])

    rows = [{"review": "a", "stars": 3, "label": "긍정"}, {"prompt": "b"}, {"prompt": "c", "stars": 2, "more": "!"}]
    write(tmp_path / "questions.jsonl", rows)
    question, args = {"review": "own", "stars": "5", "more": "", "label": ""}, Asked(tmp_path, tmp_path)
    asked = ["".join(one.prompt) for one in load_questions(args, review, question).asked]
    assert asked == ["평: a, 별: 3", "평: b, 별: 5", "평: c, 별: 2!"]
    write(tmp_path / "questions.jsonl", [{"stars": 3}])
    with pytest.raises(UserError, match="line 1 has none of the columns review, prompt; it has: stars"):
        load_questions(args, review, question)


# ------------------------------------------------------------------------------------------------ rows of a chat


def asked_of_chat(row, tmp_path, system=None):
    """The messages as which a row is asked."""
    write(tmp_path / "questions.jsonl", [row])
    args = Asked(tmp_path, tmp_path, system=system)
    return load_questions(args, chat, {"prompt": "own", "system": system}).asked[0]


USER, SYSTEM = {"role": "user", "content": "a"}, {"role": "system", "content": "s"}
TALK = [USER, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


@pytest.mark.parametrize(
    "row, system, messages",
    [
        ({"prompt": "a"}, None, [USER]),
        ({"prompt": "a"}, "s", [SYSTEM, USER]),
        ({"prompt": "a", "system": "s"}, "other", [SYSTEM, USER]),
        ({"messages": TALK}, None, TALK),
        ({"messages": TALK, "prompt": "not asked"}, "s", [SYSTEM, *TALK]),
        ({"messages": [SYSTEM, USER]}, "other", [SYSTEM, USER]),
        ({"conversations": [{"from": "human", "value": "a"}]}, None, [USER]),
        ({"messages": None, "prompt": "a"}, None, [USER]),
        ({"instruction": "a", "output": "not asked", "system": "s"}, "other", [SYSTEM, USER]),
        ({"instruction": "c", "history": [["a", "b"]]}, "s", [SYSTEM, *TALK]),
    ],
)
def test_what_a_row_of_a_chat_asks(row, system, messages, tmp_path):
    assert asked_of_chat(row, tmp_path, system).messages == messages


def test_tools_of_a_row_are_told_to_the_model(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    assert asked_of_chat({"messages": [USER], "tools": tools}, tmp_path).tools == tools


@pytest.mark.parametrize(
    "row, words",
    [
        ({"text": "a"}, ["none of the columns messages, conversations, instruction, prompt", "text"]),
        ({"prompt": ""}, ["last message is empty"]),
        ({"prompt": ["a"]}, ["column 'prompt' holds a list"]),
        ({"messages": []}, ["last message must be from the user"]),
        ({"messages": "a"}, ["messages are text, not a list"]),
        ({"messages": TALK[:2]}, ["last message must be from the user", "Add the question"]),
        ({"messages": [{"role": "bot", "content": "a"}]}, ["message 1 has the role 'bot'"]),
        ({"prompt": "a", "system": ["s"]}, ["the system message is a list of parts"]),
        ({"instruction": "a", "history": [["b"]]}, ["history is not a list of [question, answer]"]),
        ({"messages": [USER], "tools": "a"}, ["tools are text"]),
    ],
)
def test_a_row_that_is_no_conversation(row, words, folder, stand_ins, warm):
    (folder / "chat").symlink_to(stand_ins["llama3"])
    write(folder / "questions.jsonl", [{"prompt": "a"}, row])
    command = "python tutorial/inference_qwen3.py --model-name-or-path ./chat --max-new-tokens 2"
    done = warm(f"{command} --prompt-file questions.jsonl --save-path answers.jsonl", cwd=folder, ok=None)
    tells(done, "questions.jsonl, line 2", *words)
    assert "Device" not in done.stdout and not list(folder.glob("answers*"))
