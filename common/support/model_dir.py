"""What lies in a model's directory: whether its weights are all there, an adapter's base, how it was trained.

Weights are never read here, only the headers of their files, so that it costs nothing before a training either. None of
this imports torch. The format of safetensors: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

from common.support.exit import UserError, install_hint
from common.support.files import atomic_write, weights_fingerprint

ADAPTER = "adapter_model.safetensors"  # as peft has it, like adapter_config.json
RUN = "run.json"  # options, versions, data and template of a training, beside its result


def require_model(model_dir: str, hint: str = "", template: Optional[Callable] = None) -> None:
    """UserError, ending in `hint`, unless `model_dir` is a directory with all its weights, or a hub id.

    Of an adapter's directory its own weights and those of its base are checked. With `template` the model must have
    been trained on prompts of that template, or not say anything about it: else it is asked in a format that it never
    saw, and answers all the same.
    """
    require_directory(model_dir, hint)
    base = base_of(model_dir)
    if base != model_dir:
        _check_file(Path(model_dir) / ADAPTER, set(), "train the adapter again")
        hint = (
            f"it is the base of the adapter {model_dir}. Download it again, or write where it is into "
            f"base_model_name_or_path of {model_dir}/adapter_config.json"
        )
        require_directory(base, hint)
    if Path(base).is_dir():
        check_weights(base, hint=hint or "download the model again")
    if template:
        _require_template(model_dir, template.__name__)


def require_adapter(adapter_dir: str) -> None:
    """UserError unless `adapter_dir` is an adapter's directory, and its base is there."""
    require_model(adapter_dir)
    if base_of(adapter_dir) == adapter_dir:
        raise UserError(f"{adapter_dir} is a whole model: give the directory of an adapter, which --use-lora saves")


def require_directory(model_dir: str, hint: str = "") -> None:
    """UserError unless `model_dir` is a directory, or looks like a hub id (`owner/name`) and no such path exists."""
    path = Path(model_dir)
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model_dir) and not path.parent.is_dir()
    if not path.is_dir() and (path.exists() or not hub_id):
        what = "is a file, not a directory" if path.exists() else "does not exist"
        raise UserError(f"the model directory {model_dir} {what}: {hint or 'give it with --model-name-or-path'}")


def base_of(model_dir: str) -> str:
    """The model on which `model_dir`, an adapter's directory, was trained, by its adapter_config.json; of a whole model
    itself. UserError where that file is damaged."""
    config = Path(model_dir) / "adapter_config.json"
    if not config.is_file():
        return model_dir
    try:
        base = json.loads(config.read_text("utf-8"))["base_model_name_or_path"]
    except (ValueError, TypeError, KeyError):
        base = None
    if not (base and isinstance(base, str)):
        raise UserError(f"{config} is damaged: train the adapter again, or save it as UTF-8 without a byte order mark")
    return base


def adapter_facts(adapter_dir: str) -> dict:
    """What model.adapters wrote beside an adapter's weights, str -> str; of another tool's less, of none {}."""
    return header_of(Path(adapter_dir) / ADAPTER, {}).get("__metadata__", {})


def run_of(model_dir: str) -> dict:
    """run.json of the training whose result `model_dir` is; {} where there is none, or another tool's."""
    try:
        run = json.loads((Path(model_dir) / RUN).read_bytes())
    except (OSError, ValueError):
        return {}
    known = isinstance(run, dict) and all(isinstance(run.get(part), dict) for part in ("options", "dataset"))
    return run if known else {}


def template_of(model_dir: str) -> Optional[str]:
    """The name of the template on whose prompts the model was trained, None where nothing tells."""
    return adapter_facts(model_dir).get("template") or run_of(model_dir).get("dataset", {}).get("template")


def raw_config(model_dir: str) -> dict:
    """config.json of a model's directory as it is written; {} of a hub id. UserError where it is damaged."""
    path = Path(model_dir) / "config.json"
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: delete it and download the model again") from None


def positions_and_embeddings(model_dir: str) -> Tuple[Optional[int], Optional[int]]:
    """Tokens that the model can see at once, and tokens that it knows; None where its config does not say.

    UserError for an encoder-decoder model.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base_of(model_dir), trust_remote_code=False)
    if config.is_encoder_decoder:
        raise UserError(
            f"{model_dir} is an encoder-decoder model ({config.model_type}), which is trained in another way. Take a "
            "causal language model (Llama, Mistral, GPT)."
        )
    of_text = getattr(config, "text_config", config)  # of a model that reads pictures too
    return getattr(of_text, "max_position_embeddings", None), getattr(of_text, "vocab_size", None)


def safetensors_files(model_dir: str) -> List[Path]:
    """The safetensors files that transformers reads of a directory: the whole one before the shards beside it."""
    whole = Path(model_dir) / "model.safetensors"
    return [whole] if whole.is_file() else sorted(Path(model_dir).glob("model-*.safetensors"))


def stored_tensors(model_dir: str) -> Dict[str, dict]:
    """{name: {"dtype": "F32", "BF16", ..., "shape": [...]}} of a directory's safetensors files; of others {}."""
    tensors = {name: entry for file in safetensors_files(model_dir) for name, entry in header_of(file, {}).items()}
    tensors.pop("__metadata__", None)
    return tensors


def bytes_of_weights(model_dir: str) -> int:
    """Bytes of the weights as they are stored; 0 of a hub id."""
    files = safetensors_files(model_dir) or Path(model_dir).glob("pytorch_model*.bin")
    return sum(file.stat().st_size for file in files)


def check_weights(model_dir: str, hint: str = "run the download command again") -> None:
    """Check that the weights in the directory `model_dir` are all there, by the headers of their files alone.

    hint: the reader's next step, the end of the message. Raises UserError with the name of the first file amiss.
    """
    directory = Path(model_dir).expanduser()
    if not (directory / "config.json").is_file():
        raise UserError(f"{model_dir} is not a model directory, it has no config.json: {hint}")
    for name in ("model.safetensors", "pytorch_model.bin"):  # the order in which transformers looks for them
        index = directory / (name + ".index.json")
        if (directory / name).is_file():
            return _check_file(directory / name, set(), hint)
        if index.is_file():
            shards: dict = {}  # file name -> names of its tensors
            try:
                for tensor, shard in json.loads(index.read_bytes())["weight_map"].items():
                    shards.setdefault(str(shard), set()).add(tensor)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(f"{index} is damaged: delete it and {hint}") from None
            for shard, tensors in sorted(shards.items()):
                _check_file(directory / shard, tensors, hint)
            return None
    raise UserError(f"{model_dir} has no weights (model.safetensors or pytorch_model.bin, or their index): {hint}")


def _require_template(model_dir: str, asked: str) -> None:
    learned, folder = template_of(model_dir), Path(sys.argv[0]).parent
    if learned and learned != asked:
        scripts = sorted(folder.glob("inference_*.py"))
        right = [path for path in scripts if re.search(rf"template={learned}\b", path.read_text("utf-8"))]
        names = " or ".join(path.as_posix() for path in right) or "the script of its tutorial"
        raise UserError(
            f"{model_dir} was trained on prompts of the template {learned}, and this script asks in that of {asked}. "
            f"Ask it with {names}."
        )


def _check_file(path: Path, tensors: set, hint: str) -> None:
    """Check one file of weights. tensors: names that must be in it (only a safetensors file tells them unloaded)."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {hint}")
    damaged = UserError(f"{path} is cut short or damaged: delete it and {hint}")
    if path.suffix != ".safetensors":
        # torch >= 1.6 writes a zip file, its table of contents last; before, a pickle
        with path.open("rb") as file:
            start = file.read(2)
        if not (zipfile.is_zipfile(path) if start == b"PK" else start[:1] == b"\x80"):
            raise damaged
        return
    header = header_of(path)
    if header is None:
        raise damaged
    names = set(header) - {"__metadata__"}
    if tensors - names:
        raise UserError(f"{path} lacks the tensor {min(tensors - names)}: delete it and {hint}")


def header_of(path: Path, otherwise=None):
    """The header of a safetensors file, {tensor: {"dtype", "shape", "data_offsets"}}; `otherwise` of a damaged one."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            # 8 bytes, little endian: the header's length; the header, JSON; the tensors
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > size or length > 100_000_000:  # the format's own limit
                return otherwise
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return header if size == 8 + length + max(ends, default=0) else otherwise
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return otherwise


RECORD = Path(".cache", "huggingface", "origin.json")  # where the hub's library keeps what it knows of a directory


def write_origin(model_dir: str, name: str, revision: str) -> None:
    """Write down that the model in `model_dir` is `name` of the hub, in this revision."""
    record = {"name": name, "revision": revision, "weights": weights_fingerprint(model_dir)}
    with atomic_write(Path(model_dir) / RECORD) as new:
        new.write_text(json.dumps(record), encoding="utf-8")


def read_origin(model_dir: str) -> dict:
    """{"name": its id on the hub, "revision"} of a model's directory; of a hub id itself its name; {}: not known, as of
    weights that are others now, a stand-in's or a trained model's."""
    path = Path(model_dir)
    with suppress(OSError, ValueError, TypeError, AttributeError):
        record = json.loads((path / RECORD).read_bytes())
        if record.pop("weights", None) == weights_fingerprint(model_dir):
            return {key: str(value) for key, value in record.items()}
    return {"name": model_dir} if is_hub_id(model_dir) and not path.exists() else {}


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name))


def base_models(model_dir: str, merged: Optional[str] = None) -> dict:
    """For run.json: the base, and the adapter that was trained further or `merged` into it, as they were given."""
    base = base_of(merged or model_dir)
    adapter = merged or (model_dir if base != model_dir else None)
    return {"base": base, **({"adapter": adapter} if adapter else {}), **({"merged": True} if merged else {})}


def explain_load_error(error: Exception) -> str:
    """Why a model's files could not be loaded, and what helps, for the reader; "" where nothing tells."""
    text = " ".join(str(error).split())
    short = text if len(text) <= 160 else text[:160].rsplit(" ", 1)[0] + " ..."
    if isinstance(error, ModuleNotFoundError) and error.name:
        return install_hint(error.name)
    if isinstance(error, ImportError):
        return f"{short} Install that package."
    if "trust_remote_code" in text or "custom code" in text:
        return "it needs code of its own, which is never run here. Take a model that transformers knows."
    if "Unrecognized configuration class" in text:
        return "it is no causal language model. Take one (Llama, Mistral, GPT)."
    if "not recognize this architecture" in text or "quantization" in text:
        return f"the transformers that is installed can't ({short}). A newer one may: pip install -U transformers"
    if "mismatch" in text:
        return f"config.json and weights are of different models ({short}). Download both again."
    return ""
