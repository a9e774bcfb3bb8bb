"""Terminals and pipes: letters that a console lacks, other encodings, byte order marks, `| head`, a full disk."""

from __future__ import annotations

import codecs
import json
import os
import re
import subprocess
import sys

import pytest

from tests import terminal
from tests.conftest import ROOT, TIMEOUT, environment, run
from tests.helpers import (
    DOWNLOAD,
    INFERENCE,
    PREPARE,
    SAMPLE,
    SCRIPTS,
    TRAIN,
    contents,
    error_of,
    first_fast,
    refusal,
    tells,
)

ASK = SCRIPTS["inference"]
CLOSED_PIPE = 141  # 128 + SIGPIPE, as of a program that knows nothing of it
LETTERS = "naïve 👍 한글 \u2019"  # no encoding below has them all


@pytest.fixture
def refused(ready, warm):
    return refusal(ready, warm)


def shown(text, encoding):
    return text.encode(encoding, "replace").decode(encoding)


# ------------------------------------------------------------------------------------------------ what is printed


@pytest.mark.parametrize("encoding", first_fast(1, ["cp949", "ascii", "latin-1"]))
def test_letters_that_the_terminal_lacks(encoding, ready, warm):
    done = warm(ASK, "--prompt", LETTERS, cwd=ready, env={"PYTHONIOENCODING": encoding})
    assert f"[SUMMARIZE] {shown(LETTERS, encoding)} [/SUMMARIZE]" in done.stdout


@pytest.mark.slow
def test_letters_that_the_terminal_lacks_by_a_process_of_its_own(ready):
    """As Windows' console and Korean servers have it."""
    done = subprocess.run(
        [sys.executable, *ASK.split()[1:], "--prompt", LETTERS],
        cwd=ready,
        env=environment(HF_HOME=str(ready / ".hf_home"), PYTHONIOENCODING="cp949"),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"[SUMMARIZE] {shown(LETTERS, 'cp949')} [/SUMMARIZE]" in done.stdout.decode("cp949")


@pytest.mark.slow
def test_answers_on_a_terminal_that_lacks_their_letters(ready, warm):
    rows = [json.dumps({"article": f"{LETTERS} {row}", "highlights": LETTERS}) for row in range(20)]
    (ready / "mine.jsonl").write_text("\n".join(rows))
    warm(f"{PREPARE} --dataset-name-or-path mine.jsonl", cwd=ready)
    warm(f"{TRAIN} --use-lora --save-dir adapter", cwd=ready)
    words = "--model-name-or-path adapter --dataset-name-or-path llama3_dataset.pt --rows 1 --max-new-tokens 2"
    for encoding in ("ascii", "cp949"):
        compared = warm(f"python tutorial/compare_adapter.py {words}", cwd=ready, env={"PYTHONIOENCODING": encoding})
        assert shown(LETTERS, encoding) in compared.stdout
    evaluated = warm(f"python tutorial/evaluate.py {words}", cwd=ready, env={"PYTHONIOENCODING": "ascii"})
    assert "Perplexity" in evaluated.stdout


@pytest.mark.parametrize("encoding", first_fast(1, ["cp949", "ascii", "latin-1"]))
def test_help_in_letters_that_the_terminal_lacks(encoding, folder):
    """A reader's own copy of a script, with a docstring in his own words."""
    source = (ROOT / "tutorial" / "inference_llama3.py").read_text(encoding="utf-8")
    source = source.replace("Path(__file__).resolve().parents[1]", repr(str(ROOT)))
    (folder / "mine.py").write_text(source.replace('"""Ask', f'"""{LETTERS} Ask', 1), encoding="utf-8")
    command = [sys.executable, "mine.py", "--help"]
    done = subprocess.run(command, cwd=folder, env=environment(PYTHONIOENCODING=encoding), capture_output=True)
    assert done.returncode == 0 and done.stderr == b""
    assert shown(LETTERS, encoding) in done.stdout.decode(encoding)


def test_an_error_line_on_a_terminal_without_korean(folder):
    done = run(INFERENCE, "--model-name-or-path", "./모델", cwd=folder, env={"PYTHONIOENCODING": "ascii"}, ok=None)
    tells(done, "./\\ubaa8\\ub378 does not exist")


def test_without_any_output(folder):
    """As a service without a terminal starts it: both streams are None in Python."""
    command = f'"{sys.executable}" tutorial/train_llama3.py --bach-size 8 >&- 2>&-'
    assert subprocess.run(command, shell=True, cwd=folder, env=environment()).returncode == 2


@pytest.mark.slow
def test_log_lines_are_not_glued_to_the_progress_bar(ready):
    """In a terminal, where a carriage return goes back to the start of the line, and the next text covers the old."""
    words = "--batch-size 16 --max-train-steps 3 --log-interval 2 --eval-rows 4"
    command = [sys.executable, "tutorial/train_llama3.py", *words.split()]
    status, text = terminal.run(command, [], ready, environment(HF_HOME=str(ready / ".hf_home")))
    assert status == 0, text
    shown = []
    for line in text.splitlines():
        cells = ""
        for part in line.split("\r"):
            cells = part + cells[len(part) :]
        shown.append(cells.rstrip())
    steps = [re.sub(r"[\d.]+(?= \||$| tokens)", "N", line) for line in shown if "[Step" in line]
    loss = "Loss: N | Duration: N | Throughput: N tokens/sec"
    assert steps == [
        "[Step 0/3] | Held-out loss: N",
        f"[Step 2/3] | {loss}",
        f"[Step 3/3] | {loss}",
        "[Step 3/3] | Held-out loss: N",
    ]
    memory = [line for line in shown if "Memory:" in line]
    assert len(memory) == 2
    for line in memory:
        assert re.fullmatch(r"Memory: [\d.]+ GB used, peak [\d.]+ GB \(\d+% of [\d.]+ GB\)", line)
    assert "\r" in text and any(line.startswith("100%|") and line.endswith("step/s]") for line in shown)


# ------------------------------------------------------------------------------------------------ what the reader gives


@pytest.mark.parametrize(
    "command, option",
    [
        (ASK, "--prompt"),
        (INFERENCE, "--model-name-or-path"),
        (TRAIN, "--save-dir"),  # else after the training: run.json could not be written
        (PREPARE, "--dataset-name-or-path"),
        (DOWNLOAD, "--token"),
    ],
)
def test_a_word_that_is_no_utf_8(command, option, folder):
    before = contents(folder)
    command = [sys.executable.encode(), *command.encode().split()[1:], option.encode(), "café".encode("latin-1")]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    tells(done, "'caf\\udce9' is not UTF-8 text", "terminal")
    assert contents(folder) == before


def test_a_prompt_file_with_a_byte_order_mark(ready, warm):
    """Windows' editor writes one."""
    (ready / "text.txt").write_bytes(codecs.BOM_UTF8 + "안녕\n".encode())
    assert "[SUMMARIZE] 안녕 [/SUMMARIZE]" in warm(ASK, "--prompt-file", "text.txt", cwd=ready).stdout


@pytest.mark.parametrize(
    "content",
    ["안녕".encode("cp949"), "hello".encode("utf-16"), "hello".encode("utf-16-le"), b"hel\0lo"],
    ids=["cp949", "UTF-16", "UTF-16 without a mark", "NUL"],
)
def test_a_prompt_file_that_is_no_utf_8_text(content, ready, refused):
    (ready / "text.txt").write_bytes(content)
    refused(ASK, "--prompt-file", "text.txt", tells_of=["--prompt-file text.txt can't be read", "save it as UTF-8"])


def test_a_prompt_file_of_a_byte_order_mark_alone_is_empty(ready, refused):
    (ready / "text.txt").write_bytes(codecs.BOM_UTF8)
    refused(ASK, "--prompt-file", "text.txt", tells_of=["text.txt can't be read or is empty"])


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.json", "mine.csv"])
def test_data_with_a_byte_order_mark(name, ready, warm):
    rows = [{"article": f"news {row}", "highlights": "short"} for row in range(3)]
    lines = ["article,highlights", *(f"news {row},short" for row in range(3))]
    texts = {
        "mine.jsonl": "\n".join(map(json.dumps, rows)),
        "mine.json": json.dumps(rows),
        "mine.csv": "\n".join(lines),
    }
    (ready / name).write_bytes(codecs.BOM_UTF8 + texts[name].encode())
    done = warm(f"{PREPARE} --dataset-name-or-path {name}", cwd=ready)
    assert "train: 3 rows" in done.stdout


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_an_adapter_config_in_another_encoding(encoding, ready, refused):
    """The pages say to edit it where the base has moved. peft reads it as UTF-8, and takes no mark."""
    (ready / "adapter").mkdir()
    text = json.dumps({"base_model_name_or_path": "./llama3-8b"})
    (ready / "adapter" / "adapter_config.json").write_text(text, encoding=encoding)
    words = ["adapter/adapter_config.json", "save it as UTF-8 without a byte order mark"]
    refused(INFERENCE, "--model-name-or-path", "./adapter", tells_of=words)


def test_a_models_config_with_a_byte_order_mark(ready, refused):
    config = ready / "llama3-8b" / "config.json"
    config.write_bytes(codecs.BOM_UTF8 + config.read_bytes())
    refused(ASK, tells_of=["./llama3-8b"])


# ------------------------------------------------------------------------------------------------ pipes and full disks


@pytest.mark.parametrize(
    "command",
    [
        TRAIN,
        f"{PREPARE} --dataset-name-or-path {SAMPLE} --save-path new.pt",
        ASK,
        "python tutorial/evaluate.py --model-name-or-path ./llama3-8b --base-model-name-or-path ./llama3-8b "
        "--dataset-name-or-path ./llama3_dataset.pt --max-new-tokens 2 --rows 2",
        f"{DOWNLOAD} --tiny --save-dir new",
        "python tutorial/check_accelerator.py --json",
    ],
)
def test_nobody_reads_the_output(command, ready, warm):
    """What is written is whole: nothing lies beside it."""
    before = contents(ready)
    done = warm(command, cwd=ready, ok=None, into="")
    assert done.returncode == CLOSED_PIPE
    assert "Traceback" not in done.stderr and "rror" not in done.stderr, done.stderr
    left = {name.split("/")[0] for name in contents(ready).keys() - before.keys()}
    assert left <= {"new", "new.pt"}  # these two scripts say nothing before their output is whole, or at its end


@pytest.mark.slow
@pytest.mark.parametrize("script", ["tutorial/train_llama3.py", "tutorial/inference_llama3.py"])
def test_nobody_reads_the_help(script, folder):
    """The second is shorter than a buffer, and meets the closed pipe at the exit. Python drops the first by itself."""
    command = f'"{sys.executable}" {script} --help | true; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.stderr == done.stdout == ""
    assert done.returncode in ((CLOSED_PIPE,) if "inference" in script else (0, CLOSED_PIPE))


def test_head_has_read_enough(ready):
    """By a real pipe, and with the messages on standard error going the same way."""
    command = f'{ASK.replace("python", sys.executable)} --prompt hello 2>&1 | head -c 1; exit "${{PIPESTATUS[0]}}"'
    env = environment(HF_HOME=str(ready / ".hf_home"))
    done = subprocess.run(["bash", "-c", command], cwd=ready, env=env, capture_output=True, text=True)
    assert (done.returncode, len(done.stdout), done.stderr) == (CLOSED_PIPE, 1, "")


@pytest.mark.slow
def test_a_training_whose_output_closes(ready):
    """It ends at its next line: no model, and a log of the lines that were read."""
    words = "--batch-size 8 --max-train-steps 100000 --log-interval 1 --eval-rows 0"
    command = [sys.executable, "tutorial/train_llama3.py", *words.split()]
    env = environment(HF_HOME=str(ready / ".hf_home"))
    process = subprocess.Popen(command, cwd=ready, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while "[Step 2/" not in process.stdout.readline():
            assert process.poll() is None, process.communicate()
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(TIMEOUT) == CLOSED_PIPE
    finally:
        process.kill()
    assert "Traceback" not in err and "rror" not in err, err
    assert os.listdir(ready / "llama3_summarization") == ["training_log.jsonl"]


def test_the_output_goes_to_a_full_disk(ready, warm):
    """One line, and not a second one from the exit for what is still in a buffer."""
    done = warm(f"{ASK} --prompt hello", cwd=ready, ok=None, into="/dev/full")
    assert "No space left on device. " in error_of(done)
