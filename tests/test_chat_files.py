"""Files of conversations, by the reader's own commands: every prepare script takes them."""

from __future__ import annotations

import json
import re

import pytest
import torch

from common.dataset_file import held_out_prompts
from common.tokenization import load_tokenizer
from tests.conftest import ROOT
from tests.helpers import contents, parquet, tells
from tests.test_chat import CHATML, GEMMA, HEADERS, R1, THINKS, by_library, message, talk
from tests.tutorials import HELD_OUT_ROWS, ROWS

SCRIPTS = sorted(path.name for path in (ROOT / "dataset").glob("prepare_*.py"))
OWN = "--model-name-or-path ./llama3-8b --block-size 128 --save-path new.pt"
PLAIN = HEADERS
NO_SYSTEM = GEMMA.replace("<start_of_turn>", "<|start_header_id|>").replace("<end_of_turn>", "<|eot_id|>")
ENDS_SOME = PLAIN.replace("'<|eot_id|>'", "('<|eot_id|>' if messages[0].content != 'b' else '')")
PREPARE = f"python dataset/prepare_smollm2_dataset.py {OWN}"
QWEN3 = f"python dataset/prepare_qwen3_dataset.py {OWN}"
TALKS = [talk(f"질문 {n}", f"답 {n}", "그리고?", f"끝 {n}", system="짧게." if n % 2 else None) for n in range(40)]


def give_template(folder, template=PLAIN):
    path = folder / "llama3-8b" / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "chat_template": template}), encoding="utf-8")
    return load_tokenizer(str(folder / "llama3-8b"))


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def ids_of(split):
    return [part.tolist() for part in split["input_ids"].split(split["lengths"].tolist())]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_prepare_script_takes_conversations(script, ready, warm):
    tokenizer = give_template(ready)
    write(ready / "talks.jsonl", [{"id": n, "messages": messages} for n, messages in enumerate(TALKS)])
    done = warm(f"python dataset/{script} {OWN} --dataset-name-or-path talks.jsonl", cwd=ready)
    assert "train: 38 rows, " in done.stdout and "0 prompts and 0 answers truncated, 0 rows without" in done.stdout
    dataset = torch.load(ready / "new.pt")
    assert dataset["meta"]["end_tokens"] == [tokenizer.convert_tokens_to_ids("<|eot_id|>")] != [tokenizer.eos_token_id]
    assert dataset["meta"]["template"] == "chat" and dataset["meta"]["counts"]["train"]["conversations"] == 38
    held_out = TALKS[19::20]
    assert ids_of(dataset["validation"]) == [by_library(tokenizer, messages) for messages in held_out]
    assert ids_of(dataset["train"])[5] == by_library(tokenizer, TALKS[5])
    learned = dataset["validation"]["input_ids"][dataset["validation"]["loss_mask"]].tolist()
    assert tokenizer.decode(learned) == "".join(f"답 {n}<|eot_id|>끝 {n}<|eot_id|>" for n in (19, 39))


def test_all_forms_of_a_file_make_the_same(ready, warm):
    give_template(ready)
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = [[{"from": names[one["role"]], "value": one["content"]} for one in messages] for messages in TALKS]
    write(ready / "1.jsonl", [{"messages": messages} for messages in TALKS])
    write(ready / "2.jsonl", [{"conversations": messages} for messages in sharegpt])
    write(ready / "3.jsonl", [{"대화": messages, "messages": None} for messages in TALKS])
    (ready / "4.json").write_text(json.dumps([{"messages": messages, "tools": None} for messages in TALKS]))
    (ready / "5.parquet").write_bytes(parquet([{"messages": messages} for messages in TALKS]))
    made = []
    for name, words in {
        "1.jsonl": "",
        "2.jsonl": "",
        "3.jsonl": "--columns messages=대화",
        "4.json": "",
        "5.parquet": "",
    }.items():
        warm(f"{PREPARE} --dataset-name-or-path {name} {words}", cwd=ready)
        made.append(torch.load(ready / "new.pt")["meta"]["sha256"])
    assert all(one == made[0] for one in made)


def test_rows_of_the_hub(ready, warm, warm_hub, tmp_path):
    give_template(ready)
    (tmp_path / "train.parquet").write_bytes(parquet([{"messages": messages} for messages in TALKS]))
    warm_hub.repos["datasets"] = {"owner/talks": {"train.parquet": (tmp_path / "train.parquet").read_bytes()}}
    try:
        done = warm(f"{PREPARE} --dataset-name-or-path owner/talks", cwd=ready)
    finally:
        warm_hub.repos["datasets"] = {}
    assert "train: 38 rows, " in done.stdout and torch.load(ready / "new.pt")["meta"]["template"] == "chat"


def test_rows_that_have_what_the_template_asks_for_stay_questions_and_answers(ready, warm):
    """A conversation beside them changes nothing; whoever wants it says so."""
    row = {"instruction": "q", "input": "", "output": "a"}
    write(ready / "with.jsonl", [{**row, "messages": TALKS[0]}] * 3)
    write(ready / "without.jsonl", [row] * 3)
    made = []
    for name in ("with", "without"):
        warm(f"{PREPARE} --dataset-name-or-path {name}.jsonl", cwd=ready)
        made.append(torch.load(ready / "new.pt")["meta"])
    assert made[0]["sha256"] == made[1]["sha256"] and made[0]["template"] == "short_alpaca"
    assert "conversations" not in made[0]["counts"]["train"]


def test_a_row_for_each_answer_is_said(ready, warm):
    give_template(ready, THINKS.replace("im_start", "start_header_id").replace("im_end", "eot_id"))
    thought = "<think>\nhm\n</think>\n\n"
    write(ready / "talks.jsonl", [{"messages": talk("a", thought + "b", "c", thought + "d")}] * 3)
    done = warm(f"{PREPARE} --dataset-name-or-path talks.jsonl", cwd=ready)
    assert "train: 6 rows, one for each answer of 3 conversations, " in done.stdout
    counts = torch.load(ready / "new.pt")["meta"]["counts"]["train"]
    assert (counts["rows"], counts["conversations"]) == (6, 3)


def test_conversations_are_shown_with_each_answer_in_brackets(ready, warm):
    give_template(ready)
    write(ready / "talks.jsonl", [{"messages": messages} for messages in [*TALKS[:2], talk("a")]])
    said = warm(f"{PREPARE} --dataset-name-or-path talks.jsonl --show 3", cwd=ready).stdout
    assert "<|end_header_id|>\n\n[답 0<|eot_id|>]<|start_header_id|>user" in said and "\n\n[끝 1<|eot_id|>]\n" in said
    assert "--- row 3: dropped (no answer)" in said and "1 row without an answer dropped" in said


def test_rows_with_control_tokens_in_the_text_are_dropped_and_the_first_is_named(ready, warm):
    tokenizer = give_template(ready)
    bad = [talk("a<|eot_id|>", "b"), talk("a", "<|end_of_text|>")]
    rows = [{"messages": messages} for messages in (TALKS[0], *bad, talk("a"), TALKS[1])]
    write(ready / "talks.jsonl", [*rows, {**rows[0], "tools": [{"name": "f", "description": "ends by <|eot_id|>"}]}])
    said = warm(f"{PREPARE} --dataset-name-or-path talks.jsonl --show 3", cwd=ready).stdout
    dropped = "3 rows with control tokens in the text dropped (first: talks.jsonl, line 2: <|eot_id|>)\n"
    assert f"1 row without an answer dropped, {dropped}" in said
    assert "--- row 3: dropped (control token in talks.jsonl, line 3: <|end_of_text|>)\n" in said
    dataset = torch.load(ready / "new.pt")
    assert ids_of(dataset["train"]) == [by_library(tokenizer, messages) for messages in TALKS[:2]]
    assert dataset["meta"]["counts"]["train"]["control tokens"] == 3


def test_what_the_template_leaves_out_is_said_and_the_same_data_gives_the_same_file(ready, warm):
    tokenizer = give_template(ready, R1.replace("im_start", "start_header_id"))
    thought = "<think>\n왜냐하면\n</think>\n\n"
    weather = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {**message("assistant", ""), "tool_calls": [{**weather, "function": {"name": "weather", "arguments": {}}}]}
    reasons = {**message("assistant", "답"), "reasoning_content": "왜냐하면"}
    rows = [
        *(
            {"messages": talk("물음", text)}
            for text in ("1", "<b>굵게</b>", "assistant", f"{thought}답", f"{thought}<b>")
        ),
        {"messages": [message("user", "물음"), reasons]},
        {"messages": [message("user", "물음"), call], "tools": [weather]},
        {"messages": talk("물음", "답", "물음", "답", system="짧게.")},
    ]
    write(ready / "talks.jsonl", rows)
    made = []
    for _ in range(2):
        said = warm(f"{PREPARE} --dataset-name-or-path talks.jsonl", cwd=ready).stdout
        made.append((ready / "new.pt").read_bytes())
    assert made[0] == made[1]
    for what, number in {
        "leaves out <think>": 2,
        "leaves out reasoning_content": 1,
        "leaves out tool_calls": 1,
        "leaves out the tools": 1,
        "leaves out the system message": 2,
        "asks in another form than it writes (trained as it asks)": 9,
    }.items():
        assert f"train: the chat template {what} in {number} of 9 answers\n" in said
    split = torch.load(ready / "new.pt")["train"]
    learned = tokenizer.decode(split["input_ids"][split["loss_mask"]])
    end, asks = tokenizer.eos_token, "<|start_header_id|>assistant\n<think>\n"
    answers = ["1", "<b>굵게</b>", "assistant", "\n\n답", "\n\n<b>", "답", "", "답", "답"]
    assert learned.replace("\n", "") == "".join(answer + end for answer in answers).replace("\n", "")
    for ids, mask in zip(ids_of(split), split["loss_mask"].split(split["lengths"].tolist())):
        assert (
            tokenizer.decode(ids[: mask.tolist().index(True)]).rstrip()
            == tokenizer.decode(ids).split(asks)[0] + asks.rstrip()
        )


def test_a_text_that_would_take_minutes_is_one_line(ready, warm):
    give_template(ready)
    long = "가나다라" * 500_001  # without a space, between which two words could be told apart
    for row, words in (
        ({"messages": talk(long, "a")}, "talks.jsonl, line 2: the conversation has 2,000,"),
        ({"messages": talk("a", long)}, "talks.jsonl, line 2: the conversation has 2,000,"),
        ({"instruction": long, "input": "", "output": "a"}, "the text that begins with '### Instruction:\\n가나다라"),
        ({"instruction": "a", "input": "", "output": long}, "the text that begins with '가나다라"),
    ):
        short = {name: talk("a", "b") if name == "messages" else "a" for name in row}
        write(ready / "talks.jsonl", [short, row])
        done = warm(f"{PREPARE} --dataset-name-or-path talks.jsonl", cwd=ready, ok=None)
        tells(done, words, "2,000,000 is the most. Shorten it.")


def test_a_held_out_question_is_all_before_the_last_answer(ready, warm):
    tokenizer = give_template(ready)
    write(ready / "talks.jsonl", [{"messages": [*messages, *talk("고마워.")]} for messages in TALKS])
    warm(f"{PREPARE} --dataset-name-or-path talks.jsonl", cwd=ready)
    questions = held_out_prompts(torch.load(ready / "new.pt"), "new.pt", tokenizer, 9)
    assert len(questions) == 2
    for (prompt, answer), number in zip(questions, (19, 39)):
        assert prompt == by_library(tokenizer, TALKS[number][:-1], add_generation_prompt=True)
        assert answer == f"끝 {number}"


@pytest.mark.parametrize("processes", [1, 3])
def test_many_are_the_same_from_any_number_of_processes(processes, ready, warm):
    give_template(ready)
    write(ready / "talks.jsonl", [{"messages": messages} for messages in TALKS] * 40)
    limit = ready / "limit.py"
    limit.write_text(
        "import os, runpy, sys\n"
        f"os.sched_getaffinity = lambda _: set(range({processes}))\n"
        "sys.argv = sys.argv[1:]\nsys.path.insert(0, 'dataset')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    warm(f"python limit.py {PREPARE[len('python ') :]} --dataset-name-or-path talks.jsonl", cwd=ready)
    tokenizer, split = load_tokenizer(str(ready / "llama3-8b")), torch.load(ready / "new.pt")["train"]
    expected = {n: by_library(tokenizer, messages) for n, messages in enumerate(TALKS)}
    kept = [n % 40 for n in range(1600) if (n + 1) % 20]
    assert ids_of(split) == [expected[n] for n in kept]


@pytest.mark.parametrize(
    ("template", "rows", "said"),
    [
        ("", [TALKS[0]], ["llama3-8b", "no chat template", "base model", "Instruct"]),
        (
            CHATML,
            [TALKS[0]],
            ["llama3-8b", "ends no answer with a token"],
        ),  # its tokens are not those of the tokenizer
        (NO_SYSTEM, [TALKS[0], TALKS[1]], ["talks.jsonl, line 2", "System role", "before the first user message"]),
        (ENDS_SOME, [talk("a", "b"), talk("b", "c")], ["talks.jsonl, line 2", "ends no answer"]),
        ("{{ raise_exception('No,\nnever.') }}" + HEADERS, [TALKS[0]], ["chat template", "No, never."]),
        ("{% for m in messages %}", [TALKS[0]], ["chat template", "llama3-8b"]),
        (None, [TALKS[0], [{"role": "bot", "content": "a"}]], ["talks.jsonl, line 2", "'bot'"]),
        (None, [TALKS[0], [{"role": "user", "content": [{"type": "text"}]}]], ["line 2", "message 1", "list of parts"]),
        (None, [talk("a")], ["All rows of the dataset", "talks.jsonl", "were dropped"]),
        (None, [talk("a", "<|eot_id|>")], ["All rows of the dataset", "talks.jsonl", "were dropped"]),
        (None, [talk("a", "b", system="long " * 200)], ["line 1", "--block-size 128 leaves no room"]),
    ],
)
def test_conversations_that_cannot_be_used(template, rows, said, ready, warm):
    give_template(ready, *[template] * (template is not None))
    write(ready / "talks.jsonl", [{"messages": messages} for messages in rows])
    before = contents(ready)
    tells(warm(f"{PREPARE} --dataset-name-or-path talks.jsonl", cwd=ready, ok=None), *said)
    assert contents(ready) == before


def test_rows_of_another_kind_are_said(ready, warm):
    give_template(ready)
    good = {"messages": TALKS[0]}
    for row, said in {
        '{"text": "a"}': "no column 'messages'; it has: text",
        '{"instruction": "a"}': "no column 'output'",
    }.items():
        write(ready / "talks.jsonl", [good, json.loads(row)])
        tells(warm(f"{PREPARE} --dataset-name-or-path talks.jsonl", cwd=ready, ok=None), "line 2", said)
    write(ready / "talks.jsonl", [good])
    for words in ("messages=talk", "mesages=messages"):
        done = warm(f"{PREPARE} --dataset-name-or-path talks.jsonl --columns {words}", cwd=ready, ok=None)
        tells(done, f"--columns {words}")


# ------------------------------------------------------------------------------------------------ what has its place

WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ (tool | tojson) + '\n' }}{% endfor %}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '\n' + (m.content or '') }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name + (call.function.arguments | tojson) }}{% endfor %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\n' }}{% endif %}"
)


def call(arguments):
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


def tool_rows(*arguments):
    schema = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    rows = []
    for number, one in enumerate(arguments):
        properties = {f"p{number}": {"type": "number"}}
        tool = {**schema, "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}
        messages = [*talk("날씨?"), {"role": "assistant", "content": "", "tool_calls": [call(one)]}]
        rows.append({"messages": messages, "tools": [tool]})
    return rows


def test_system_and_history_are_where_alpacas_rows_have_them(ready, warm):
    tokenizer = give_template(ready)
    row = {"instruction": "수도는?", "input": "", "output": "서울", "system": "짧게.", "history": [["한국?", "네."]]}
    own_system = {"messages": talk("a", "b", system="own"), "system": "other"}
    by_sharegpt = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}
    write(ready / "rows.jsonl", [{**row, "messages": None}, by_sharegpt, own_system])
    said = warm(f"{QWEN3} --dataset-name-or-path rows.jsonl", cwd=ready).stdout
    expected = [
        talk("한국?", "네.", "수도는?", "서울", system="짧게."),
        talk("a", "b", system="s"),
        own_system["messages"],
    ]
    assert ids_of(torch.load(ready / "new.pt")["train"]) == [by_library(tokenizer, one) for one in expected]
    assert "\nColumns not used: system\n" in said  # of the third
    write(ready / "rows.jsonl", [{**row, "history": [["a"]]}])
    done = warm(f"{QWEN3} --dataset-name-or-path rows.jsonl", cwd=ready, ok=None)
    tells(done, "rows.jsonl, line 1", "its history is not a list of [question, answer]")


@pytest.mark.parametrize("script", [name for name in SCRIPTS if "qwen3" not in name][:2])
def test_columns_and_keys_that_are_not_used_are_named_once(script, ready, warm):
    give_template(ready)
    row = {"instruction": "a", "article": "a", "output": "b", "highlights": "b"}
    others = {"id": 0, "system": "s", "history": [["a", "b"]], "empty": None, "none": "", "list": []}
    write(ready / "rows.jsonl", [row, {**row, **others}] * 3)
    said = warm(f"python dataset/{script} {OWN} --dataset-name-or-path rows.jsonl --show 1", cwd=ready).stdout
    assert said.count("Columns not used: ") == 1 and re.search("Columns not used: .*id, system, history\n", said)
    messages = talk("a", "b")
    messages[0].update(name="Kim", weight=0.5, empty=None)
    write(ready / "rows.jsonl", [{"messages": messages, "source": "web", "tools": [{"name": "f"}]}])
    said = warm(f"python dataset/{script} {OWN} --dataset-name-or-path rows.jsonl", cwd=ready).stdout
    assert "\nColumns not used: source, tools, messages.name, messages.weight\n" in said


def test_a_weight_of_zero_has_no_loss(ready, warm):
    tokenizer = give_template(ready)
    messages = talk("1+1?", "3", "다시", "2", "고마워", "네")
    for number, weight in ((1, 0), (3, 1), (5, 0)):
        messages[number]["weight"] = weight
    write(ready / "rows.jsonl", [{"messages": messages}, {"messages": messages[:2]}])
    said = warm(f"{PREPARE} --dataset-name-or-path rows.jsonl", cwd=ready).stdout
    train = torch.load(ready / "new.pt")["train"]
    assert ids_of(train) == [by_library(tokenizer, talk("1+1?", "3", "다시", "2"))]
    assert tokenizer.decode(train["input_ids"][train["loss_mask"]]) == "2<|eot_id|>"
    assert "1 row without an answer dropped" in said and "not used" not in said


def test_a_null_column_is_a_missing_one(ready, warm):
    """As in data sets that were put together."""
    give_template(ready)
    sharegpt = [{"from": "human", "value": "물음"}, {"from": "gpt", "value": "답"}]
    rows = [{"messages": talk("질문", "대답")}, {"instruction": "지시", "output": "결과"}, {"conversations": sharegpt}]
    names = ["messages", "instruction", "output", "conversations"]
    write(ready / "missing.jsonl", rows)
    write(ready / "null.jsonl", [{name: row.get(name) for name in names} for row in rows])
    (ready / "null.parquet").write_bytes(parquet([{name: row.get(name) for name in names} for row in rows]))
    made = []
    for name in ("missing.jsonl", "null.jsonl", "null.parquet"):
        for prepare in (QWEN3, PREPARE):
            said = warm(f"{prepare} --dataset-name-or-path {name}", cwd=ready).stdout
            assert "train: 3 rows" in said
            made.append(torch.load(ready / "new.pt")["meta"]["sha256"])
    assert all(one == made[0] for one in made)
    write(ready / "null.jsonl", [{name: row.get(name) for name in names} for row in rows[1:]])
    done = warm(f"{PREPARE} --dataset-name-or-path null.jsonl", cwd=ready, ok=None)
    tells(done, "null.jsonl, line 2 has messages, the first row has none")


def test_tools_of_a_table_and_arguments_of_json_text_are_those_of_json_lines(ready, warm):
    tokenizer = give_template(ready, WITH_TOOLS)
    arguments = [{"city": "서울", "t": 0.7, "deep": [{"a": 1.10}]}, {"deep": [{"b": {"c": 1e2}}], "z": 1}, {}]
    rows = tool_rows(*arguments)
    as_text = tool_rows(*[json.dumps(one, ensure_ascii=False) for one in arguments[:2]], "")
    write(ready / "1.jsonl", rows)
    (ready / "2.json").write_text(json.dumps(rows))
    (ready / "3.parquet").write_bytes(parquet(rows))
    write(ready / "4.jsonl", as_text)
    write(ready / "5.jsonl", [{**row, "tools": json.dumps(row["tools"])} for row in as_text])
    for name in ("1.jsonl", "2.json", "3.parquet", "4.jsonl", "5.jsonl"):
        warm(f"{PREPARE} --dataset-name-or-path {name}", cwd=ready)
        made = ids_of(torch.load(ready / "new.pt")["train"])
        expected = [by_library(tokenizer, row["messages"], tools=row["tools"]) for row in rows]
        assert made == expected, (name, tokenizer.decode(made[0]))
    write(ready / "6.jsonl", tool_rows("no JSON"))
    done = warm(f"{PREPARE} --dataset-name-or-path 6.jsonl", cwd=ready, ok=None)
    tells(done, "6.jsonl, line 1", "arguments of a call in message 2 are not a JSON object")
    # a template that joins them to its text takes them as they are written
    tokenizer = give_template(ready, WITH_TOOLS.replace("call.function.arguments | tojson", "call.function.arguments"))
    warm(f"{PREPARE} --dataset-name-or-path 4.jsonl", cwd=ready)
    expected = [by_library(tokenizer, row["messages"], tools=row["tools"]) for row in as_text]
    assert ids_of(torch.load(ready / "new.pt")["train"]) == expected


# ------------------------------------------------------------------------------------------------ the samples


def test_the_sample_conversations_are_what_is_said_of_them():
    rows = {
        split: [
            json.loads(line)["messages"]
            for line in (ROOT / "dataset" / "samples" / "korean_conversations" / f"{split}.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        ]
        for split in ("train", "validation")
    }
    assert {split: len(some) for split, some in rows.items()} == {"train": ROWS, "validation": HELD_OUT_ROWS}
    seen = set()
    for some in rows.values():
        turns = [[one["role"] for one in messages if one["role"] != "system"] for messages in some]
        assert all(roles == ["user", "assistant"] * (len(roles) // 2) for roles in turns)
        assert sum(len(roles) > 2 for roles in turns) == len(some) // 2
        assert 3 < sum(messages[0]["role"] == "system" for messages in some) < len(some) // 2
        for messages in some:
            first = next(one["content"] for one in messages if one["role"] == "user")
            assert first not in seen and not seen.add(first)
            for one in messages:
                assert one.keys() == {"role", "content"} and one["content"] == one["content"].strip()
                assert re.search("[가-힣]", one["content"]) or one["content"].isascii()
