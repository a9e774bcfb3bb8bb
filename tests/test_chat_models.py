"""What has learned from conversations: it ends its turns by the template's token, in our scripts and in other tools."""

from __future__ import annotations

import json
import shlex
import shutil
import sys

import pytest
import torch

from common.dataset_file import held_out_prompts
from common.tokenization import load_tokenizer
from tests import terminal
from tests.conftest import environment, lay_out
from tests.helpers import HAS_QWEN3, first_fast, quantizes, tells
from tests.test_chat import talk
from tests.test_chat_files import PLAIN, give_template, write

TALK = talk("제주도 날씨는?", "맑아요.", "그럼 서울은?", "비가 와요.", system="날씨만 말해.")
ALONE = talk("그럼 서울은?", "무엇을요?", system="날씨만 말해.")  # the same question, without what was said before
SILENT = [*TALK[:2], TALK[3], {"role": "assistant", "content": "둘 다요?"}]  # without the answer that was given
PREPARE = "python dataset/prepare_llama3_dataset.py --block-size 128 --dataset-name-or-path talks.jsonl"
MEMORIZE = "--batch-size 16 --max-train-steps 90 --lr 6e-3 --lr-scheduler linear --warmup-steps 5 --log-interval 30"
ASK = "python tutorial/inference_qwen3.py --max-new-tokens 40"
QWEN3 = "python dataset/prepare_qwen3_dataset.py"


@pytest.fixture(scope="module")
def memorized(base, warm, tmp_path_factory):
    """A folder in which Llama3's stand-in has learned three conversations by heart. Its template ends a turn by another
    token than the tokenizer's end token."""
    folder = lay_out(tmp_path_factory.mktemp("memorized") / "work")
    shutil.copytree(base / "llama3-8b", folder / "llama3-8b")
    give_template(folder)
    write(folder / "talks.jsonl", [{"messages": messages} for messages in (ALONE, TALK, SILENT, TALK)] * 10)
    warm(PREPARE, cwd=folder)
    warm(f"python tutorial/train_llama3.py {MEMORIZE} --save-dir ./chat", cwd=folder)
    return folder


def test_the_end_of_a_turn_is_the_end_token_of_the_result(memorized):
    tokenizer = load_tokenizer(str(memorized / "chat"))
    settings = json.loads((memorized / "chat" / "generation_config.json").read_text(encoding="utf-8"))
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert settings["eos_token_id"] == [end, tokenizer.eos_token_id]
    assert tokenizer.chat_template == PLAIN  # and the template comes along
    run = json.loads((memorized / "chat" / "run.json").read_text(encoding="utf-8"))
    assert (run["dataset"]["template"], run["dataset"]["end_tokens"]) == ("chat", [end])


def test_all_ends_are_saved_and_stop_an_answer(ready, warm):
    """Those of texts and of tool calls, and the base model's own."""
    call_end, own = "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"
    tokenizer = give_template(ready, PLAIN.replace("'<|eot_id|>'", f"('{call_end}' if m.tool_calls else '<|eot_id|>')"))
    ids = tokenizer.convert_tokens_to_ids(["<|eot_id|>", call_end, tokenizer.eos_token, own])
    base = {"eos_token_id": ids[2:]}
    (ready / "llama3-8b" / "generation_config.json").write_text(json.dumps(base), encoding="utf-8")
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    rows = [[TALK[1], call], [TALK[1], call, {"role": "tool", "content": "맑음"}, TALK[2]], TALK[1:3]]
    write(ready / "talks.jsonl", [{"messages": messages} for messages in rows])
    warm(PREPARE, cwd=ready)
    assert torch.load(ready / "llama3_dataset.pt")["meta"]["end_tokens"] == ids[:2]
    warm("python tutorial/train_llama3.py --max-train-steps 1 --eval-rows 0 --save-dir ./new", cwd=ready)
    path = ready / "new" / "generation_config.json"
    assert json.loads(path.read_text(encoding="utf-8"))["eos_token_id"] == ids
    path.write_text(json.dumps({"eos_token_id": list(range(len(tokenizer)))}), encoding="utf-8")
    said = warm(f"{ASK} --model-name-or-path ./new --prompt a", cwd=ready).stdout
    assert "(stopped at --max-new-tokens" not in said  # after one token, whatever it is


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--prompt", "제주도 날씨는?", "--system", "날씨만 말해."], "맑아요."),
        (["--prompt", "그럼 서울은?", "--system", "날씨만 말해."], "무엇을요?"),
        ([], None),  # the script's own question: no terminal is there
    ],
)
def test_a_question_is_asked_by_the_template_and_the_answer_ends_by_itself(words, answer, memorized, warm):
    said = warm(ASK, "--model-name-or-path", "./chat", *words, cwd=memorized).stdout
    if answer:
        assert said.endswith(f"system\n\n날씨만 말해.user\n\n{words[1]}assistant\n\n\n{answer}\n"), said
    else:
        assert "user\n\n비 오는 날 집에서" in said


def test_a_file_of_prompts_is_answered_as_it_was_learned(memorized, tmp_path, warm):
    """Whole conversations, and questions with a system text of their own or of --system; turns end by their token."""
    folder = lay_out(tmp_path / "work")
    (folder / "chat").symlink_to(memorized / "chat")
    first, last = {"prompt": "제주도 날씨는?", "system": "날씨만 말해."}, {"prompt": "그럼 서울은?"}
    write(folder / "questions.jsonl", [first, {"id": 7, "messages": TALK[:-1]}, {"messages": ALONE[:-1]}, last])
    words = "--prompt-file questions.jsonl --save-path answers.jsonl --batch-rows 3"
    said = warm(f"{ASK} --model-name-or-path ./chat --system '날씨만 말해.' {words}", cwd=folder).stdout
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert answers[1] == {"id": 7, "messages": TALK[:-1], "answer": "비가 와요.", "ended": True}
    assert [answer["answer"] for answer in answers] == ["맑아요.", "비가 와요.", "무엇을요?", "무엇을요?"]
    assert (
        all(answer["ended"] for answer in answers)
        and "Saved 4 answers" in said
        and "(4 ended with a stop token)" in said
    )
    done = warm(f"{ASK} --model-name-or-path ./chat {words}", cwd=folder, ok=None)
    tells(done, "answers.jsonl has answers made with another value of: system")


def test_a_question_with_a_control_token_in_its_text_is_refused(memorized, tmp_path, warm):
    ask = f"{ASK} --model-name-or-path ./chat"
    done = warm(ask, "--prompt", "<|eot_id|>이 뭐야?", cwd=memorized, ok=None)
    tells(done, "the question: ", "the control token <|eot_id|>", "Remove it from the text.")
    folder = lay_out(tmp_path / "work")
    (folder / "chat").symlink_to(memorized / "chat")
    write(folder / "questions.jsonl", [{"prompt": "a"}, {"prompt": "b", "system": "<|eot_id|>"}])
    done = warm(f"{ask} --prompt-file questions.jsonl --save-path answers.jsonl", cwd=folder, ok=None)
    tells(done, "questions.jsonl, line 2: ", "the control token <|eot_id|>")


def in_terminal(command, *typed, cwd):
    """What a terminal shows while these lines are typed, each when it is asked for."""
    arguments = [sys.executable, *shlex.split(command)[1:]]
    env = environment(HF_HOME=str(cwd / ".hf_home"), PYTHONUTF8="1")
    status, shown = terminal.run(arguments, typed, cwd=cwd, env=env)
    assert status == 0, shown
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("end", first_fast(1, [b"\n", b"  \n", b"\x04"]), ids=["empty line", "spaces", "Ctrl-D"])
def test_a_conversation_goes_on_until_an_empty_line(end, memorized):
    """What was said before is part of the next question, as it was learned."""
    typed = "제주도 날씨는?\n".encode(), "그럼 서울은?\n".encode(), end
    shown = in_terminal(f"{ASK} --model-name-or-path ./chat --system '날씨만 말해.'", *typed, cwd=memorized)
    assert "An empty line ends the conversation.\n" in shown
    assert "\n> 제주도 날씨는?\n맑아요.\n\n> 그럼 서울은?\n비가 와요.\n\n> " in shown, shown


def test_other_tools_stop_there_too(memorized):
    """Plain transformers, by what lies in the directory alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(memorized / "chat")
    tokenizer = AutoTokenizer.from_pretrained(memorized / "chat")
    text = tokenizer.apply_chat_template(TALK[:-1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "비가 와요.<|eot_id|>"


def test_scripts_that_ask_in_another_format_refuse_and_name_the_one_that_can(memorized, warm):
    done = warm("python tutorial/inference_llama3.py --model-name-or-path ./chat", cwd=memorized, ok=None)
    tells(done, "./chat was trained with the prompt template chat, and this script uses summarization")


def test_evaluate_asks_for_the_last_answer_and_stops_on_the_end_of_a_turn(memorized, warm):
    tokenizer, dataset = load_tokenizer(str(memorized / "chat")), torch.load(memorized / "llama3_dataset.pt")
    (prompt, reference), *_ = held_out_prompts(dataset, "it", tokenizer, 2)
    text = tokenizer.apply_chat_template(TALK[:-1], tokenize=False, add_generation_prompt=True)
    assert (tokenizer.decode(prompt), reference) == (text, "비가 와요.")
    pytest.importorskip("sacrebleu")
    done = warm("python tutorial/evaluate.py --model-name-or-path ./chat --rows 2 --max-new-tokens 20", cwd=memorized)
    report = json.loads((memorized / "chat" / "evaluation.json").read_text(encoding="utf-8"))
    for name, after in (("chrF (letters, %)", 100), ("Ends by itself (%)", 100)):  # it has learned all of it by heart
        found = report["measures"][name]
        assert found["before"] < found["after"] == after and found["rows"] == 2
    assert [(row["reference"], row["after"], row["ended"][1]) for row in report["answers"]] == [
        ("비가 와요.",) * 2 + (True,)
    ] * 2
    assert "Answer in the data" in done.stdout and "그럼 서울은?" in done.stdout


def test_answers_of_a_chat_end_by_themselves(memorized):
    """By what lies in the directory of the model."""
    from common.device import start_device
    from model.generate import generate_answers
    from model.load import load_model

    device = start_device(0)
    tokenizer, dataset = load_tokenizer(str(memorized / "chat")), torch.load(memorized / "llama3_dataset.pt")
    prompts = [prompt for prompt, _ in held_out_prompts(dataset, "it", tokenizer, 2)]
    model = load_model(str(memorized / "chat"), device.torch_device)
    answers = generate_answers(model, tokenizer, prompts, 20)
    assert [(text.strip(), ended) for text, ended in answers] == [("비가 와요.", True)] * 2


def test_an_adapter_and_what_is_merged_of_it(memorized, tmp_path, warm):
    pytest.importorskip("peft")
    folder = lay_out(tmp_path / "work")
    for name in ("llama3-8b", "llama3_dataset.pt"):
        (folder / name).symlink_to(memorized / name)
    warm(f"python tutorial/train_llama3.py --use-lora {MEMORIZE} --max-train-steps 2 --save-dir ./adapter", cwd=folder)
    said = warm(ASK, "--prompt", "a", "--model-name-or-path", "./adapter", cwd=folder).stdout
    assert "prompt template: chat" in said
    words = "--model-name-or-path ./adapter --save-dir ./merged"
    warm(f"python tutorial/merge_adapter.py {words}", cwd=folder)
    settings = json.loads((folder / "merged" / "generation_config.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(str(folder / "merged"))
    assert settings["eos_token_id"] == [tokenizer.convert_tokens_to_ids("<|eot_id|>"), tokenizer.eos_token_id]
    words = "--model-name-or-path ./adapter --dataset-name-or-path ./llama3_dataset.pt --rows 1 --max-new-tokens 4"
    assert "비가 와요." in warm(f"python tutorial/compare_adapter.py {words}", cwd=folder).stdout


def test_a_base_model_without_a_template_is_refused(base, warm):
    done = warm(ASK, "--model-name-or-path", "./llama3-8b", cwd=base, ok=None)
    tells(done, "./llama3-8b", "no chat template", "Instruct")


# ------------------------------------------------------------------------------------------------ Qwen3's tutorial


@pytest.mark.skipif(not HAS_QWEN3, reason="transformers before 4.51 has no Qwen3")
def test_instructions_become_conversations_of_two_turns(folder, warm):
    """The tutorial's data on the hub has the columns of the samples."""
    warm("python tutorial/download_qwen3.py --tiny", cwd=folder)
    warm(f"{QWEN3} --dataset-name-or-path dataset/samples/korean_safe_conversation", cwd=folder)
    dataset, tokenizer = torch.load(folder / "qwen3_dataset.pt"), load_tokenizer(str(folder / "qwen3-4b"))
    lines = (folder / "dataset/samples/korean_safe_conversation/train.jsonl").read_text(encoding="utf-8").splitlines()
    assert dataset["meta"]["template"] == "chat" and len(dataset["train"]["lengths"]) == len(lines)
    offsets, inputs = dataset["train"]["offsets"].tolist(), 0
    for number, line in enumerate(lines):
        row, (begin, end) = json.loads(line), offsets[number : number + 2]
        ids, mask = (dataset["train"][part][begin:end] for part in ("input_ids", "loss_mask"))
        question = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
        inputs += bool(row["input"])
        frame = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{row['output']}<|im_end|>\n"
        assert tokenizer.decode(ids) == frame
        assert tokenizer.decode(ids[mask]) == f"{row['output']}<|im_end|>"
    assert inputs
    done = warm(f"{QWEN3} --dataset-name-or-path dataset/samples/cnn_dailymail", cwd=folder, ok=None)
    tells(done, "line 1", "no column 'messages'", "article, highlights")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_QWEN3 or not quantizes(), reason="needs Qwen3 and a bitsandbytes that quantizes on a CPU")
def test_qwen3_in_4_bit_and_with_all_weights(folder, warm):
    warm("python tutorial/download_qwen3.py --tiny", cwd=folder)
    warm(f"{QWEN3} --dataset-name-or-path dataset/samples/korean_conversations/validation.jsonl", cwd=folder)
    for words in ("--load-in-4bit", "--no-use-lora"):
        warm(f"python tutorial/train_qwen3.py --max-train-steps 1 --eval-rows 0 {words}", cwd=folder)
        said = warm(f"{ASK} --prompt 안녕하세요? --system 짧게.", cwd=folder).stdout
        assert "system\n짧게.\nuser\n안녕하세요?\nassistant\n" in said
        shutil.rmtree(folder / "qwen3_korean_chat")
