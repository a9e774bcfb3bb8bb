"""Results of the newest set of packages, opened by an older one: the same logits, the same tokens.

    python tests/opened_by_older.py write RESULTS     # with the newest set
    python tests/opened_by_older.py read RESULTS      # with the older one

`make test-stack` runs both. Of each tutorial's stand-in all weights, an adapter and the two merged are saved as the
scripts save them. They are opened with plain transformers and peft, and by our own functions.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from common.support.model_dir import require_model
from common.tokenization import load_tokenizer
from model.load import load_model
from model.lora import add_lora
from model.save import save_model
from model.tiny import write_tiny

KINDS = ["llama2", "llama3", "llama3_1", "mistral", "gpt", "smollm2", "qwen3"]
NEEDS = {"llama3_1": (4, 43), "qwen3": (4, 51)}  # releases of transformers
TEXT = "Summarize: the harbour town of Velmora 안녕하세요 def f(x): return x + 1"
CPU = torch.device("cpu")


def logits(model) -> torch.Tensor:
    """[1, 400, vocabulary], float32: far enough for the scaling of long positions to show."""
    ids = (torch.arange(400) * 37 % 1500)[None]
    with torch.no_grad():
        return model.eval().float()(input_ids=ids).logits


def write(results: Path) -> None:
    shutil.rmtree(results, ignore_errors=True)
    for kind in KINDS:
        base = results / kind
        write_tiny(kind, base)
        for how in ("full", "adapter", "merged"):
            model, tokenizer = load_model(str(base), CPU, torch.float32, bits=0), load_tokenizer(str(base))
            if how != "full":
                model = add_lora(model, str(base), 4, 8, 0.0, ["all-linear"])
                generator = torch.Generator().manual_seed(2)
                for name, weight in model.named_parameters():
                    if "lora_B" in name:
                        weight.data.normal_(0, 0.1, generator=generator)
            if how == "merged":
                model = model.merge_and_unload()
            place = results / f"{kind}-{how}"
            save_model(model, tokenizer, str(place), base=str(base))
            again = load_model(str(place), CPU, torch.float32, bits=0)
            torch.save({"logits": logits(again), "ids": tokenizer(TEXT)["input_ids"]}, place / "expected.pt")


def read(results: Path) -> None:
    release = tuple(map(int, transformers.__version__.split(".")[:2]))
    checked = 0
    for place in sorted(results.glob("*-*")):
        kind, how = place.name.split("-")
        if release < NEEDS.get(kind, release):
            print(f"{place.name}: not opened, it needs transformers {'.'.join(map(str, NEEDS[kind]))}")
            continue
        expected = torch.load(place / "expected.pt")
        require_model(str(place))
        ours = load_model(str(place), CPU, torch.float32, bits=0)
        base = str(results / kind) if how == "adapter" else str(place)
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
        if how == "adapter":
            from peft import PeftModel

            plain = PeftModel.from_pretrained(plain, str(place))
        for model in (ours, plain):
            difference = (logits(model) - expected["logits"]).abs().max() / expected["logits"].abs().max()
            assert difference < 1e-4, f"{place.name}: the logits differ by {difference:.2g} of the largest"
        assert load_tokenizer(str(place))(TEXT)["input_ids"] == expected["ids"], f"{place.name}: other tokens"
        assert transformers.AutoTokenizer.from_pretrained(place)(TEXT)["input_ids"] == expected["ids"], place.name
        checked += 1
    assert checked == 3 * sum(release >= NEEDS.get(kind, release) for kind in KINDS)
    print(f"{checked} results opened by transformers {transformers.__version__}: the same logits and tokens")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]).resolve())
