"""The page of tutorial/web_demo.py in a real browser without a window: what a reader sees, and what it never does.

No part of make test: make test-web installs Gradio and playwright. The browser is the system's Chromium.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import socket
import threading
import time
import urllib.request
from argparse import Namespace
from contextlib import contextmanager
from importlib.util import find_spec

import psutil
import pytest
import torch

from common.device import start_device
from common.tokenization import load_tokenizer
from dataset.questions import Asker
from model.generate import generate_answers
from model.load import load_model
from model.pair import load_pair
from tests.conftest import ROOT, TIMEOUT, lay_out, run, start
from tests.helpers import Gate

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
MISSING = [name for name in ("gradio", "playwright") if not find_spec(name)]
pytestmark = [
    pytest.mark.web,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}. Run: make test-web"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium. Run: sudo apt-get install chromium fonts-noto-cjk"),
]
MILLISECONDS = 60_000  # against a page that hangs
PAGE = "python tutorial/web_demo.py"
HOSTILE = (
    """<img src=x onerror="hacked=1"><script>hacked=1</script> [a](javascript:hacked=1) **b** $$x$$ &lt;</textarea>"""
)
WIDE = "나" * 120
KNOWN = {"하늘의 색은?": "파랗습니다.", f"이것은? {HOSTILE}": f"이것입니다:\n  {HOSTILE}", "가" * 120: WIDE}
SKY, ODD, LONG = KNOWN
LEARN = "--block-size 512 --epochs 150 --batch-size 3 --lr 6e-3 --warmup-steps 10 --log-interval 50 --eval-rows 0"

# ------------------------------------------------------------------------------------------------ models, page, browser


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A folder in which the tiny model ./smollm2_korean_numbers has learned three answers by heart."""
    folder = lay_out(tmp_path_factory.mktemp("numbers") / "work")
    run("python tutorial/download_smollm2.py --tiny", cwd=folder)
    (folder / "data").mkdir()
    rows = [{"instruction": question, "output": answer} for question, answer in KNOWN.items()]
    write(folder / "data" / "train.jsonl", rows)
    write(folder / "data" / "validation.jsonl", rows)
    run("python dataset/prepare_smollm2_dataset.py --dataset-name-or-path data", cwd=folder)
    run(f"python tutorial/train_smollm2.py {LEARN}", cwd=folder)
    return folder


@contextmanager
def serving(folder, model, base, dataset):
    """The page of two models in this process, where a test can hold them back: what it is made of."""
    from gradio import close_all

    made = Namespace(model_name_or_path=f"{folder}/{model}", base_model_name_or_path=f"{folder}/{base}")
    made.dataset_name_or_path = f"{folder}/{dataset}"
    made.tokenizer = load_tokenizer(made.model_name_or_path)
    made.asker = Asker(made.model_name_or_path, made.tokenizer)
    made.device = start_device(seed=0)
    made.pair = load_pair(made.model_name_or_path, made.base_model_name_or_path, made.device)
    make_page = runpy.run_path(str(ROOT / "tutorial" / "web_demo.py"), run_name="web_demo")["make_page"]
    made.page, look = make_page(made, made.asker, made.pair)
    made.page.launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True, **look)
    try:
        yield made
    finally:
        close_all(verbose=False)


@pytest.fixture(scope="module")
def served(numbers):
    with serving(numbers, "smollm2_korean_numbers", "smollm2-135m", "smollm2_dataset.pt") as made:
        yield made


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=root)


class Page:
    """The page as a reader has it. `called`: the addresses that the browser asked for; `dialogs`: what popped up."""

    def __init__(self, browser, url, width=1000):
        self.tab = browser.new_page(viewport={"width": width, "height": 800}, locale="ko-KR")
        self.tab.set_default_timeout(MILLISECONDS)
        self.url, self.called, self.dialogs = url, [], []
        self.tab.on("request", lambda request: self.called.append(request.url))
        self.tab.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.tab.goto(url)
        self.question = self.tab.get_by_label("질문", exact=True)
        self.reference = self.tab.get_by_label("데이터의 정답")
        self.base = self.tab.get_by_label("학습 전:")
        self.trained = self.tab.get_by_label("학습 후:")
        self.examples = self.tab.locator("button.gallery-item")
        self.button("옵션").wait_for()  # the last one

    def button(self, name):
        return self.tab.get_by_role("button", name=name)

    def ask(self, text):
        self.question.fill(text)
        self.question.press("Enter")

    def has(self, box, text):
        from playwright.sync_api import expect

        expect(box).to_have_value(text, timeout=MILLISECONDS)

    def begins(self, box):
        self.has(box, re.compile("[^…]"))

    def some_of(self, box, answer):
        """What the box has when it has something, but not all, of that answer."""
        self.begins(box)
        text = box.input_value()
        assert answer.startswith(text) and len(text) < len(answer), text
        return text


@pytest.fixture
def page(browser, served):
    page = Page(browser, served.page.local_url)
    yield page
    page.tab.close()


def answer_of(made, side, messages, max_new_tokens=256, temperature=0.0, seed=0):
    """What the model of that side answers by itself."""
    model = load_model(getattr(made, f"{side}_name_or_path"), made.device.torch_device, made.device.dtype)
    prompt = made.asker.encode(messages, max_new_tokens)
    torch.manual_seed(seed)
    [answer] = generate_answers(model, made.tokenizer, [prompt], max_new_tokens, made.asker.ends, temperature)
    return answer.text


def is_answering():
    return any(thread.name.startswith("answer") for thread in threading.enumerate())


# ------------------------------------------------------------------------------------------------ what a reader sees


def test_a_page_in_korean_that_asks_nobody_else(page, served):
    names = [button.inner_text().split("\n")[0] for button in page.tab.get_by_role("button").all()]
    assert names[0] == SKY and names[3:] == ["질문하기", "중지", "지우기", "옵션"]
    assert page.tab.title() == "학습 전과 후의 답" and page.tab.get_by_text("학습에 쓰지 않은 질문").is_visible()
    page.button("옵션").click()
    for label in ("답의 최대 토큰 수", "temperature", "seed"):
        page.tab.get_by_label(label).first.wait_for()
    assert page.tab.get_by_label("시스템 메시지").count() == 0  # no chat
    page.ask(SKY)
    page.has(page.trained, KNOWN[SKY])
    assert {url for url in page.called if not url.startswith((page.url, "data:"))} == set()
    with urllib.request.urlopen(f"{page.url}gradio_api/info") as answer:
        assert json.load(answer) == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_both_answers_are_those_of_inference(page, numbers):
    write(numbers / "questions.jsonl", [{"prompt": text} for text in KNOWN])
    answers = {}
    for name in ("smollm2_korean_numbers", "smollm2-135m"):
        words = f"--prompt-file questions.jsonl --save-path {name}.jsonl --batch-rows 1"
        run(f"python tutorial/inference_smollm2.py --model-name-or-path ./{name} {words}", cwd=numbers)
        lines = (numbers / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        answers[name] = [json.loads(line)["answer"] for line in lines]
    assert answers["smollm2_korean_numbers"] == [*KNOWN.values()]
    for text, trained, base in zip(KNOWN, *answers.values()):
        page.ask(text)
        page.has(page.trained, trained)
        page.has(page.base, base)


def test_an_example_shows_the_right_answer_until_something_is_typed(page):
    page.examples.nth(0).click()
    page.has(page.question, SKY)
    page.has(page.reference, KNOWN[SKY])
    page.question.press("End")
    page.tab.keyboard.type(" ")
    page.has(page.reference, "")


def test_one_answer_after_the_other_grows_in_its_box(page, served):
    base = answer_of(served, "base_model", [{"role": "user", "content": ODD}])
    with Gate(served.pair.trained) as trained_gate, Gate(served.pair.base) as base_gate:
        page.ask(ODD)
        page.has(page.trained, "…")
        trained_gate.allow(20)
        first = page.some_of(page.trained, KNOWN[ODD])
        trained_gate.allow(30)
        longer = "([box, text]) => box.value.length > text.length"
        page.tab.wait_for_function(longer, arg=[page.trained.element_handle(), first])
        assert page.base.input_value() == "…" and base_gate.calls == 0
        trained_gate.allow(1000)
        page.has(page.trained, KNOWN[ODD])
        base_gate.allow(20)
        page.some_of(page.base, base)
        base_gate.allow(1000)
        page.has(page.base, base)
    assert page.trained.input_value() == KNOWN[ODD]


@pytest.mark.parametrize("side", ["trained", "base"])
def test_stop_ends_the_answer(side, page, served):
    """And not only what is shown of it: the model computes no more tokens, and the other model none at all."""
    answers = {"trained": KNOWN[LONG], "base": answer_of(served, "base_model", [{"role": "user", "content": LONG}])}
    box = getattr(page, side)
    with Gate(served.pair.trained) as trained_gate, Gate(served.pair.base) as base_gate:
        gate = trained_gate
        if side == "base":
            trained_gate.allow(10_000)
            gate = base_gate
        page.ask(LONG)
        gate.allow(10)
        page.some_of(box, answers[side])
        page.button("중지").click()
        while is_answering():
            gate.allow(1)
            time.sleep(0.05)
        assert gate.calls < 80 and (side == "base" or base_gate.calls == 0)
        assert box.input_value() and len(box.input_value()) < len(answers[side])
    page.ask(SKY)
    page.has(page.trained, KNOWN[SKY])


def test_an_answer_that_nobody_waits_for_ends(browser, served):
    """Whoever asks next need not wait for it."""
    page = Page(browser, served.page.local_url)
    with Gate(served.pair.trained) as gate, Gate(served.pair.base) as base_gate:
        page.ask(LONG)
        gate.allow(10)
        page.begins(page.trained)
        page.tab.close()
        while is_answering():
            gate.allow(1)
            time.sleep(0.05)
        assert gate.calls < 80 and base_gate.calls == 0


def test_a_new_question_ends_the_answer_to_the_last_one(page, served):
    with Gate(served.pair.trained) as gate, Gate(served.pair.base) as base_gate:
        page.ask(LONG)
        gate.allow(10)
        page.some_of(page.trained, WIDE)
        page.ask(SKY)
        while page.trained.input_value() != KNOWN[SKY]:
            gate.allow(1)
            page.tab.wait_for_timeout(50)
        assert gate.calls < 100 and base_gate.calls == 0


def test_clear_stops_and_empties(page, served):
    with Gate(served.pair.trained) as gate:
        page.examples.nth(2).click()
        page.has(page.reference, WIDE)
        page.button("질문하기").click()
        gate.allow(10)
        page.some_of(page.trained, WIDE)
        page.button("지우기").click()
        while is_answering():
            gate.allow(1)
            time.sleep(0.05)
        for box in (page.question, page.reference, page.trained, page.base):
            page.has(box, "")


def test_an_empty_question_is_told(page):
    page.ask("  ")
    page.has(page.base, "error: The question is empty.")


def test_options_are_those_of_inference(page, served):
    def choose(label, value):
        page.tab.get_by_label(re.compile(label)).first.fill(value)
        page.tab.keyboard.press("Tab")

    question = [{"role": "user", "content": LONG}]
    page.button("옵션").click()
    choose("답의 최대 토큰 수", "9")
    page.ask(LONG)
    page.has(page.base, answer_of(served, "base_model", question, 9))
    choose("temperature", "2")
    # Before the page is asked, which draws from the same random numbers in this process.
    answers = [answer_of(served, "base_model", question, 9, temperature=2.0, seed=seed) for seed in (1, 2)]
    assert answers[0] != answers[1]
    for seed, answer in zip("12", answers):
        choose("seed", seed)
        page.ask(LONG)
        page.has(page.base, answer)


# ------------------------------------------------------------------------------------------------ for everybody


def test_html_stays_text(page):
    """In the question, an example, the right answer and the answers."""
    page.examples.nth(1).click()
    page.has(page.reference, KNOWN[ODD])
    page.button("질문하기").click()
    page.has(page.trained, KNOWN[ODD])
    page.has(page.question, ODD)
    assert HOSTILE[:40] in page.examples.nth(1).inner_text()
    page.tab.wait_for_timeout(500)  # what an image or a script would need
    found = (
        "document.querySelectorAll('img[src=x], a[href^=javascript], .gradio-container script, strong, .katex').length"
    )
    assert page.tab.evaluate("[window.hacked, " + found + "]") == [None, 0]
    assert not page.dialogs and not [url for url in page.called if url.endswith("/x")]


def test_a_phone_scrolls_in_one_direction(browser, served):
    page = Page(browser, served.page.local_url, width=375)
    page.examples.nth(2).click()
    page.has(page.question, LONG)
    page.button("질문하기").click()
    page.has(page.trained, WIDE)
    page.button("옵션").click()
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= 375
    for box in (page.question, page.reference, page.base, page.trained):
        place = box.bounding_box()
        assert place["x"] >= 0 and place["x"] + place["width"] <= 375
        assert box.evaluate("box => box.scrollWidth <= box.clientWidth")
    page.tab.close()


def test_the_keyboard_is_enough(page):
    def tab_to(name):
        for _ in range(30):
            page.tab.keyboard.press("Tab")
            if page.tab.evaluate("document.activeElement.innerText").split("\n")[0] == name:
                return
        pytest.fail(f"Tab leads to no {name}")

    page.tab.keyboard.type(LONG[:5])  # the cursor is in the question already
    page.has(page.question, LONG[:5])
    page.question.press("Enter")
    page.begins(page.trained)
    tab_to("중지")
    page.tab.keyboard.press("Space")
    while is_answering():
        time.sleep(0.05)
    tab_to(SKY)
    page.tab.keyboard.press("Enter")
    page.has(page.question, SKY)
    tab_to("질문하기")
    page.tab.keyboard.press("Enter")
    page.has(page.trained, KNOWN[SKY])
    tab_to("옵션")
    page.tab.keyboard.press("Enter")
    page.tab.get_by_label(re.compile("답의 최대 토큰 수")).first.wait_for()


# ------------------------------------------------------------------------------------------------ an adapter in a chat


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """The page of an adapter that has learned a little of conversations."""
    folder = lay_out(tmp_path_factory.mktemp("talking") / "work")
    run("python tutorial/download_qwen3.py --tiny", cwd=folder)
    base = f"--model-name-or-path {folder}/qwen3-4b"
    data = "--dataset-name-or-path dataset/samples/korean_conversations"
    run(f"python dataset/prepare_qwen3_dataset.py {base} {data}", cwd=folder)
    run(f"python tutorial/train_qwen3.py {base} --max-train-steps 8 --lr 2e-2 --eval-rows 0", cwd=folder)
    with serving(folder, "qwen3_korean_chat", "qwen3-4b", "qwen3_dataset.pt") as made:
        yield made


def test_a_chat_goes_on_with_each_models_own_turns(talking, browser):
    """One set of weights serves both. The system message counts as in inference."""
    assert talking.pair.base is talking.pair.trained
    page = Page(browser, talking.page.local_url)
    page.button("옵션").click()
    page.tab.get_by_label("시스템 메시지").fill("짧게 답하세요.")
    page.tab.get_by_label(re.compile("답의 최대 토큰 수")).first.fill("12")
    page.tab.keyboard.press("Tab")
    system = {"role": "system", "content": "짧게 답하세요."}
    talks = {"base_model": [], "model": []}
    for text in ("안녕하세요?", f"그리고 {HOSTILE}?"):
        page.ask(text)
        for side, box in (("model", page.trained), ("base_model", page.base)):
            talk = talks[side]
            talk.append({"role": "user", "content": text})
            talk.append({"role": "assistant", "content": answer_of(talking, side, [system, *talk], 12)})
            shown = "\n\n".join(("> " if one["role"] == "user" else "") + one["content"] for one in talk)
            page.has(box, shown)
    assert talks["model"] != talks["base_model"]
    page.button("지우기").click()
    page.has(page.base, "")
    page.tab.get_by_label("시스템 메시지").fill("")
    page.ask("안녕하세요?")
    answer = answer_of(talking, "model", [{"role": "user", "content": "안녕하세요?"}], 12)
    page.has(page.trained, f"> 안녕하세요?\n\n{answer}")
    page.ask("<|im_end|>")
    page.has(page.base, re.compile(r"^error: the text contains the control token <\|im_end\|>"))
    page.tab.close()


# ------------------------------------------------------------------------------------------------ the command


class Outside:
    """A proxy that is asked for everything outside of this machine. `asked`: what it was asked for."""

    def __enter__(self):
        self.asked = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.env = {name: address for name in ("http_proxy", "https_proxy", "all_proxy")}
        threading.Thread(target=self.listen, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.socket.close()

    def listen(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:  # closed
                return
            with connection:
                self.asked.append(connection.recv(1000).decode(errors="replace").partition("\r")[0])


def started(folder, *words, **env):
    """The process of the page, what it has printed, and its address."""
    process = start(PAGE, *words, cwd=folder, **env)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Open "):
            break
    found = re.fullmatch(r"Open (http://127\.0\.0\.1:\d+/) in your browser\. Ctrl-C ends it\.\n", lines[-1])
    assert found, process.stderr.read()
    return process, lines, found[1]


def test_the_command_serves_this_machine_alone_until_ctrl_c(numbers, browser):
    """Which ends it in the middle of an answer. It asks nobody outside for anything."""
    with Outside() as outside:
        process, lines, url = started(numbers, **outside.env)
        sockets = psutil.Process(process.pid).net_connections("tcp")
        assert [one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN] == ["127.0.0.1"]
        page = Page(browser, url)
        page.ask(LONG)
        page.begins(page.trained)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT)
        page.tab.close()
    assert process.returncode == -signal.SIGINT
    assert errors.endswith("\nInterrupted. Run the same command again to continue.\n") and "Traceback" not in errors
    assert len(lines) == 2 and lines[0].startswith("Device: ")
    assert outside.asked == []


def test_a_public_address_is_warned_of(numbers):
    with Outside() as outside:
        process, lines, _ = started(numbers, "--share", "--dataset-name-or-path", "./none.pt", **outside.env)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert "Warning: with --share, everybody who has the public address of gradio.live can use the model.\n" in lines
    assert "No examples: There is no dataset file ./none.pt. Give it with --dataset-name-or-path.\n" in lines
    assert outside.asked and "Traceback" not in errors
