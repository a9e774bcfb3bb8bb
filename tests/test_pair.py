"""A trained model and its base asked the same: prompts as inference has them, held-out examples, answers that stop."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch

from common.dataset_file import held_out_prompts
from common.support.exit import UserError
from common.support.model_dir import ModelSource
from common.tokenization import load_tokenizer
from dataset import templates
from dataset.questions import Asker
from model.generate import generate_answers, iterate_answer
from model.load import load_model
from model.pair import BASE, TRAINED, load_pair
from model.tiny import write_tiny
from tests.conftest import lay_out, run
from tests.helpers import HAS_QWEN3, Gate, save_pissa, tells
from tests.test_training import CPU

TEXT = "비 오는 날에 할 수 있는 일은?"
PREPARE = "python dataset/prepare_smollm2_dataset.py --model-name-or-path ./smollm2-135m"
TRAIN = "python tutorial/train_smollm2.py --block-size 128 --max-train-steps 8 --lr 2e-2 --eval-rows 0"
# In the third is what could be HTML.
ROWS = [
    {"instruction": TEXT, "output": "책을 읽습니다."},
    {"instruction": "번역하세요.", "input": "book", "output": "책"},
    {"instruction": "  <b>굵게</b>\n  &amp; 'x'  ", "output": "  <i>예</i>\n"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def made(warm, tmp_path_factory):
    """A folder with a base, a model and an adapter that were trained on it, and their dataset file."""
    folder = lay_out(tmp_path_factory.mktemp("pair") / "work")
    warm("python tutorial/download_smollm2.py --tiny", cwd=folder)
    (folder / "data").mkdir()
    write(folder / "data" / "train.jsonl", ROWS * 4)
    write(folder / "data" / "validation.jsonl", ROWS)
    warm(f"{PREPARE} --dataset-name-or-path data --block-size 128", cwd=folder)
    warm(f"{TRAIN} --save-dir ./full", cwd=folder)
    warm(f"{TRAIN} --save-dir ./adapter --use-lora --lora-r 4", cwd=folder)
    return folder


@pytest.fixture
def at(made, monkeypatch):
    """In that folder: run.json names the base and the dataset file as they are found from there."""
    monkeypatch.chdir(made)
    return made


def answer_of(model_dir, prompt, tokenizer, tokens=12):
    model = load_model(str(model_dir), CPU.torch_device, CPU.dtype)
    [answer] = generate_answers(model, tokenizer, [prompt], tokens)
    return answer


def answers_of(pair, tokenizer, prompts, tokens=12):
    """{side: its last answer}, which must come from TRAINED first."""
    found = {}
    for side, answer in pair.answer(tokenizer, prompts, tokens, temperature=0.0, seed=0):
        found[side] = answer
    assert [*found] == [TRAINED, BASE]
    return found


# ------------------------------------------------------------------------------------------------ both models


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_each_answers_as_it_does_alone(name, at):
    tokenizer = load_tokenizer("smollm2-135m")
    prompt = Asker(name, tokenizer).encode([{"role": "user", "content": TEXT}], 12)
    pair = load_pair(name, "./smollm2-135m", CPU)
    for _ in range(2):  # the adapter is on again, after it was off for the base
        found = answers_of(pair, tokenizer, [prompt, prompt])
        assert found == {
            TRAINED: answer_of(name, prompt, tokenizer),
            BASE: answer_of("smollm2-135m", prompt, tokenizer),
        }
    assert found[TRAINED] != found[BASE]
    assert (pair.base is pair.trained) == (name == "adapter")


def test_an_adapter_that_takes_weights_of_its_base_away_is_no_base_when_it_is_off(at, tmp_path):
    """PiSSA: the base is then loaded by itself."""
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer("smollm2-135m")
    base = AutoModelForCausalLM.from_pretrained("smollm2-135m").float()
    save_pissa(base, tmp_path / "pissa")
    pair = load_pair(str(tmp_path / "pissa"), "smollm2-135m", CPU)
    prompt = tokenizer(TEXT)["input_ids"]
    assert pair.base is not pair.trained
    assert answers_of(pair, tokenizer, [prompt, prompt])[BASE] == answer_of("smollm2-135m", prompt, tokenizer)


@pytest.mark.parametrize(
    "changed, unchanged",
    [({}, True), ({"init_lora_weights": "gaussian"}, True), ({"bias": "all"}, False), ({"peft_type": "IA3"}, False)]
    + [({"init_lora_weights": name}, False) for name in ("pissa", "pissa_niter_4", "olora", "loftq")],
)
def test_which_adapters_leave_their_base_unchanged(changed, unchanged, at, tmp_path):
    config = json.loads((at / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changed}), encoding="utf-8")
    assert ModelSource(str(tmp_path)).leaves_base_unchanged == unchanged


# ------------------------------------------------------------------------------------------------ one answer


def test_an_answer_grows_to_the_one_that_generate_gives(at):
    tokenizer = load_tokenizer("full")
    model = load_model("full", CPU.torch_device, CPU.dtype)
    prompt = tokenizer(TEXT)["input_ids"]
    *parts, last = iterate_answer(model, tokenizer, prompt, 20, temperature=0.0)
    assert last == generate_answers(model, tokenizer, [prompt], 20)[0]
    assert len(parts) == 20 and not any(part.ended for part in parts)
    texts = [part.text for part in parts] + [last.text]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:]))
    assert texts[0] != texts[10] != last.text


@pytest.mark.parametrize("side", [TRAINED, BASE])
def test_an_answer_that_is_closed_stops_at_its_next_token(side, at):
    tokenizer = load_tokenizer("adapter")
    pair = load_pair("adapter", "./smollm2-135m", CPU)
    prompt = tokenizer(TEXT)["input_ids"]
    alone = {TRAINED: answer_of("adapter", prompt, tokenizer), BASE: answer_of("smollm2-135m", prompt, tokenizer)}
    assert not any(answer_of(name, prompt, tokenizer, 60).ended for name in ("adapter", "smollm2-135m"))
    with Gate(pair.trained) as gate:
        answers = pair.answer(tokenizer, [prompt, prompt], 60, temperature=0.0, seed=0)
        gate.allow(63 if side == BASE else 3)
        while next(answers)[0] != side:
            pass
        next(answers)
        gate.allow(50)
        answers.close()
        assert gate.calls < (110 if side == BASE else 50)
    assert answers_of(pair, tokenizer, [prompt, prompt]) == alone  # the adapter is on again


def test_an_error_of_the_thread_is_raised_where_the_answer_is_read(at):
    tokenizer = load_tokenizer("full")
    model = load_model("full", CPU.torch_device, CPU.dtype)

    def full(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    model.register_forward_pre_hook(full)
    with pytest.raises(UserError, match="^Out of memory: the answer does not fit"):
        list(iterate_answer(model, tokenizer, tokenizer(TEXT)["input_ids"], 5, temperature=0.0))


def test_sampled_answers_are_those_of_the_seed(at):
    tokenizer = load_tokenizer("full")
    pair = load_pair("full", "./smollm2-135m", CPU)
    prompt = tokenizer(TEXT)["input_ids"]

    def sampled(seed):
        return dict(pair.answer(tokenizer, [prompt, prompt], 12, temperature=1.0, seed=seed))

    torch.manual_seed(1)
    [expected] = generate_answers(pair.trained, tokenizer, [prompt], 12, temperature=1.0)
    assert sampled(1)[TRAINED] == expected
    assert sampled(1) == sampled(1) != sampled(2)


# ------------------------------------------------------------------------------------------------ what is asked


@pytest.mark.parametrize("kind, name", [("llama2", "summarization"), ("mistral", "alpaca"), ("gpt", "instruction")])
def test_a_question_has_the_template_of_the_training(kind, name, stand_ins, tmp_path):
    shutil.copytree(stand_ins[kind], tmp_path / "model")
    run = {"options": {}, "dataset": {"template": name}}
    (tmp_path / "model" / "run.json").write_text(json.dumps(run), encoding="utf-8")
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    ids = Asker(str(tmp_path / "model"), tokenizer).encode([{"role": "user", "content": TEXT}], 12)
    row = {"article": TEXT, "instruction": TEXT, "input": "", "highlights": "", "output": ""}
    assert ids == tokenizer("".join(getattr(templates, name)(row).prompt))["input_ids"]


def test_examples_are_held_out_rows_as_one_text(at):
    """What asks them again has the very ids of the row: an `input` is a part of the text here."""
    tokenizer = load_tokenizer("full")
    asker = Asker("full", tokenizer)
    are_new, examples = asker.examples("./smollm2_dataset.pt", 12)
    assert are_new
    texts = [TEXT, "번역하세요.\n\n### Input:\nbook", ROWS[2]["instruction"]]
    assert examples == [(text, row["output"].strip()) for text, row in zip(texts, ROWS)]
    rows = held_out_prompts(torch.load("smollm2_dataset.pt"), "", tokenizer, 3)
    assert [asker.encode([{"role": "user", "content": text}], 12) for text in texts] == [ids for ids, _ in rows]


def test_rows_that_the_model_may_have_learned_are_not_called_new(at, warm):
    write(at / "many.jsonl", ROWS * 8)  # one of 20 is held out
    warm(f"{PREPARE} --dataset-name-or-path many.jsonl --block-size 128 --save-path ./other.pt", cwd=at)
    are_new, examples = Asker("full", load_tokenizer("full")).examples("./other.pt", 12)
    assert not are_new and examples


def test_without_a_dataset_file_there_are_no_examples(at, capsys):
    assert Asker("full", load_tokenizer("full")).examples("./none.pt", 12) == (False, [])
    told = "No examples: There is no dataset file ./none.pt. Give it with --dataset-name-or-path.\n"
    assert capsys.readouterr().out == told


@pytest.mark.parametrize("text", ["", " \n", "\ud83d"])
def test_a_question_that_cannot_be_asked(text, at):
    asker = Asker("full", load_tokenizer("full"))
    if text.strip():  # half an emoji, as JSON may hold it
        assert asker.encode([{"role": "user", "content": text}], 12)
    else:
        with pytest.raises(UserError, match="The question is empty"):
            asker.encode([{"role": "user", "content": text}], 12)


def test_a_template_that_is_not_known(at, tmp_path):
    write_tiny("smollm2", tmp_path / "model")
    for dataset, told in (
        ({}, "has no run.json that says which prompt template it was trained with"),
        ({"template": "own"}, "was trained with the prompt template own. Add it to dataset/templates.py"),
        ({"template": "Example"}, "was trained with the prompt template Example. Add it"),  # imported there
    ):
        (tmp_path / "model" / "run.json").write_text(json.dumps({"options": {}, "dataset": dataset}), encoding="utf-8")
        with pytest.raises(UserError, match=told):
            templates.template_of(str(tmp_path / "model"))


@pytest.mark.skipif(not HAS_QWEN3, reason="transformers before 4.51 has no Qwen3")
def test_in_a_chat_all_messages_are_asked(folder, warm, monkeypatch):
    """And the examples are rows of one question."""
    warm("python tutorial/download_qwen3.py --tiny", cwd=folder)
    question = {"role": "user", "content": TEXT}
    answer = {"role": "assistant", "content": "책을 읽습니다."}
    rows = [
        {"messages": [question, answer]},
        {"messages": [question, answer, question, answer]},
        {"messages": [{"role": "system", "content": "짧게."}, question, answer]},
    ]
    (folder / "data").mkdir()
    write(folder / "data" / "train.jsonl", rows)
    write(folder / "data" / "validation.jsonl", rows)
    warm("python dataset/prepare_qwen3_dataset.py --dataset-name-or-path data --block-size 128", cwd=folder)
    words = "--block-size 128 --max-train-steps 1 --eval-rows 0"
    warm(f"python tutorial/train_qwen3.py {words}", cwd=folder)
    monkeypatch.chdir(folder)
    tokenizer = load_tokenizer("qwen3_korean_chat")
    asker = Asker("qwen3_korean_chat", tokenizer)
    for row in rows:
        messages = row["messages"][:-1]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert asker.encode(messages, 12) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode(end) for end in asker.ends] == ["<|im_end|>"]
    assert asker.examples("./qwen3_dataset.pt", 12) == (True, [(TEXT, answer["content"])])


# ------------------------------------------------------------------------------------------------ the page's own errors

PAGE = "python tutorial/web_demo.py"
needs_python = pytest.mark.skipif(sys.version_info < (3, 10), reason="of an older Python another line tells")


@needs_python
def test_a_model_that_is_not_there(folder, warm):
    done = warm(PAGE, cwd=folder, ok=None)
    tells(done, "The model directory ./smollm2_korean_numbers does not exist", "--model-name-or-path")


def test_a_python_that_is_too_old_for_gradio(ready, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.version_info = (3, 9, 18, 'final', 0)\n")
    done = run(PAGE, cwd=ready, env={"PYTHONPATH": str(tmp_path)}, ok=None)
    tells(done, "Gradio 6, which makes the page, needs Python 3.10 or newer. Use tutorial/inference_* instead.")


@pytest.mark.skipif(bool(find_spec("gradio")), reason="Gradio is installed here")
@needs_python
def test_without_gradio(at, warm):
    done = warm(f"{PAGE} --model-name-or-path ./full", cwd=at, ok=None)
    tells(done, "The page needs gradio 6.0", "not installed", "pip install -r requirements/requirements_web.txt")


@needs_python
def test_a_model_that_nothing_is_known_of(ready, warm):
    done = warm(f"{PAGE} --model-name-or-path ./llama3-8b", cwd=ready, ok=None)
    tells(done, "has no run.json that tells how it was trained: give --base-model-name-or-path")
