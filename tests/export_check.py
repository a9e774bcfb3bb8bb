"""llama.cpp's answers beside ours: what a result says on a laptop without Python (tutorial/deploy.md).

    make export-check

Three results of the real SmolLM2 135M, made by the commands of the pages in ./smollm2_export, where a second run finds
them (`rm -r smollm2_export` begins anew):

    numbers   ./smollm2_demo, the result of `make demo`: all weights, blocks
    korean    llama3_1.md's: LoRA on Korean blocks, merged by merge_adapter.py
    chat      qwen3.md's: LoRA on Korean conversations, merged, asked by the chat template of SmolLM2 itself

llama.cpp's own converter writes each as f32 and as q8_0. llama-cpp-python asks it ten questions as chat clients do, by
the template in the file, the likeliest token each time; inference_* answers the same ones from a --prompt-file. In f32
both must say the same by the letter and end alike; what llama.cpp remembers of the text, 16 bit by itself, is then f32
too, and inference_* is kept from bfloat16 as in tests/benchmarks/trainers.py, since it has no option for that. In q8_0
the first difference is named; an answer that says the same must end there as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

ROOT = Path(__file__).resolve().parents[1]
PLACE = Path("smollm2_export")
QUESTIONS = 10
NEW_TOKENS = 160
AROUND = 24  # characters of a text that are shown on either side of a difference
# what transformers writes for half a letter, where an answer is cut; llama-cpp-python goes on to the letter's end
HALF = "\ufffd"
ON_SAMPLES = "--no-quantization --eval-rows 0 --lr 1e-3 --log-interval 8 --max-train-steps 24"


class Result(NamedTuple):
    """A trained model: the scripts and the samples of its tutorial; `adapter`: it has to be trained and merged."""

    tutorial: str
    samples: str
    adapter: bool = True


RESULTS = {
    "numbers": Result("smollm2", "korean-number-phrases", adapter=False),
    "korean": Result("llama3_1", "korean_safe_conversation"),
    "chat": Result("qwen3", "korean_conversations"),
}


class Answer(NamedTuple):
    """The text of an answer, and whether it ended by itself."""

    text: str
    ended: bool


def run(*words, setup: str = "") -> None:
    """A command as the reader types it, and what it said where it fails; `setup`: Python that is executed before it."""
    print("$ python", *words, flush=True)
    start = ["-c", setup] if setup else []
    done = subprocess.run([sys.executable, *start, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])


def trained(name: str, result: Result) -> Path:
    """The directory of the result, which is made if it is not there."""
    if not result.adapter:
        return Path("smollm2_demo")
    data, adapter, merged = (PLACE / f"{name}{what}" for what in (".pt", "_adapter", "_merged"))
    base = ("--model-name-or-path", "smollm2-135m")
    if not (ROOT / data).exists():
        samples = ("--dataset-name-or-path", f"dataset/samples/{result.samples}")
        run(f"dataset/prepare_{result.tutorial}_dataset.py", *base, *samples, "--save-path", data)
    if not (ROOT / adapter / "adapter_model.safetensors").exists():
        words = ("--dataset-name-or-path", data, "--save-dir", adapter, *ON_SAMPLES.split())
        run(f"tutorial/train_{result.tutorial}.py", *base, *words)
    if not (ROOT / merged / "model.safetensors").exists():
        run("tutorial/merge_adapter.py", "--model-name-or-path", adapter, "--save-dir", merged)
    return merged


def questions_of(result: Result) -> List[List[dict]]:
    """The first questions of the held-out rows, each as the messages of a chat."""
    from dataset.sources import load_splits

    path = ROOT / "dataset" / "samples" / result.samples
    splits, _ = load_splits(str(path) if path.is_dir() else result.samples)
    rows = list(splits["validation"])[:QUESTIONS]
    # a chat has no input: blocks ask the instruction alone
    return [row["messages"][:-1] if "messages" in row else [user(row["instruction"])] for row in rows]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def our_answers(name: str, result: Result, model: Path, questions: List[List[dict]]) -> List[Answer]:
    """Of inference_*, in float32, anew each time."""
    from tests.benchmarks.trainers import IN_FLOAT32

    asked, said = PLACE / f"{name}.questions.jsonl", PLACE / f"{name}.answers.jsonl"
    # blocks take a row's `prompt`, a chat model its `messages`
    rows = [{"messages": one} if result.tutorial == "qwen3" else {"prompt": one[0]["content"]} for one in questions]
    (ROOT / asked).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (ROOT / said).unlink(missing_ok=True)
    words = ("--model-name-or-path", model, "--prompt-file", asked, "--save-path", said)
    run(f"tutorial/inference_{result.tutorial}.py", *words, "--max-new-tokens", NEW_TOKENS, setup=IN_FLOAT32)
    answers = [json.loads(line) for line in (ROOT / said).read_text(encoding="utf-8").splitlines()]
    return [Answer(one["answer"], one["ended"]) for one in answers]


def their_answers(path: Path, exact: bool, questions: List[List[dict]]) -> Tuple[List[Answer], int]:
    """llama.cpp's, and the end token of its file; `exact`: what it remembers of the text is float32, as its weights."""
    import llama_cpp

    memory = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32} if exact else {}
    model = llama_cpp.Llama(str(ROOT / path), n_ctx=2048, verbose=False, **memory)
    answers = []
    for messages in questions:
        model.reset()
        said = model.create_chat_completion(messages, temperature=0.0, max_tokens=NEW_TOKENS)["choices"][0]
        answers.append(Answer(said["message"]["content"], said["finish_reason"] == "stop"))
    end = model.token_eos()
    model.close()
    return answers, end


def first_difference(ours: str, theirs: str) -> Optional[int]:
    """The character where two texts part; None: they are the same, but for the letter in which ours is cut."""
    if ours.endswith(HALF):
        ours = ours.rstrip(HALF)
        theirs = theirs[: len(ours)] + theirs[len(ours) + 1 :]
    ours = ours.replace(HALF, "")
    if ours == theirs:
        return None
    return next((at for at, (one, other) in enumerate(zip(ours, theirs)) if one != other), min(len(ours), len(theirs)))


def compared(ours: List[Answer], theirs: List[Answer], exact: bool) -> Tuple[str, List[str]]:
    """What is to be told of the answers to the same questions, and what is wrong with them, a line each."""
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} answers beside {len(theirs)}")
    places = [first_difference(one.text, other.text) for one, other in zip(ours, theirs)]
    ended = sum(one.ended for one in ours)
    told = f"{places.count(None)} of {len(ours)} the same by the letter; {ended} end by themselves here, "
    told += f"{sum(one.ended for one in theirs)} there"
    wrong, named = [], False
    for number, (one, other, at) in enumerate(zip(ours, theirs, places), 1):
        if at is not None:
            around = [repr(answer.text[max(at - AROUND, 0) : at + AROUND]) for answer in (one, other)]
            line = f"question {number}, character {at}: {around[0]} here, {around[1]} there"
            if exact:
                wrong.append(line)
            elif not named:
                told, named = f"{told}; first difference: {line}", True
        # what says something else in q8_0 may end elsewhere too
        if one.ended and not other.ended and (exact or other.text.startswith(one.text)):
            wrong.append(f"question {number}: the answer ends by itself here, and goes on there")
        elif exact and other.ended and not one.ended:
            wrong.append(f"question {number}: the answer ends by itself there, and goes on here")
    return told, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=Path, help="directory of llama.cpp's sources, which have its converter")
    converter = parser.parse_args().llama_cpp / "convert_hf_to_gguf.py"
    (ROOT / PLACE).mkdir(exist_ok=True)
    wrong: List[str] = []
    told: Dict[str, str] = {}
    for name, result in RESULTS.items():
        model, questions = trained(name, result), questions_of(result)
        ours = our_answers(name, result, model, questions)
        settings = json.loads((ROOT / model / "generation_config.json").read_text(encoding="utf-8"))
        for form in ("f32", "q8_0"):
            path = PLACE / f"{name}.{form}.gguf"
            run(converter, model, "--outfile", path, "--outtype", form)
            started = time.perf_counter()
            theirs, end = their_answers(path, form == "f32", questions)
            lines, mistakes = compared(ours, theirs, form == "f32")
            # llama.cpp knows the end tokens of many models by their names: the answers alone do not tell
            if end != settings["eos_token_id"]:
                mistakes.append(f"the end token of the file is {end}, and the model's is {settings['eos_token_id']}")
            size = (ROOT / path).stat().st_size / 1e6
            told[f"{name}, {form}"] = lines
            print(f"{name}, {form}, {size:.0f} MB, {time.perf_counter() - started:.0f} s: {lines}", flush=True)
            wrong += [f"{name}, {form}: {line}" for line in mistakes]
    print("\n".join(["", *(f"{what}: {lines}" for what, lines in told.items())]))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
