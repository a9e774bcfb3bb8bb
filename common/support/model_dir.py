"""What is in a model's directory: its weights, the base model of an adapter, how it was trained, where it comes from.

Weights are never read here, only the headers of their files, which takes milliseconds. None of this imports torch.
"""

from __future__ import annotations

import json
import re
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

from common.support.exit import UserError, install_hint, short_message
from common.support.files import atomic_write, weights_fingerprint

ADAPTER = "adapter_model.safetensors"  # peft's names, like adapter_config.json
RUN = "run.json"  # options, versions, data and template of a training, next to its result
ORIGIN = Path(".cache", "huggingface", "origin.json")  # in the directory of the hub's own records


def read_json(path: Path) -> dict:
    """The object in a JSON file (UTF-8, without a byte order mark); {} where the file is missing or damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class ModelSource:
    """The directory, or hub id, of a base model or an adapter. Each file is read once, when it is first needed."""

    def __init__(self, path: str):
        self.path = str(path)
        self.directory = Path(path)

    @cached_property
    def adapter_config(self) -> dict:
        """adapter_config.json; {} where there is none. UserError where it is damaged."""
        path = self.directory / "adapter_config.json"
        config = read_json(path)
        if path.is_file() and not isinstance(config.get("base_model_name_or_path"), str):
            raise UserError(
                f"{path} is damaged: train the adapter again, or save it as UTF-8 without a byte order mark"
            )
        return config

    @property
    def is_adapter(self) -> bool:
        return bool(self.adapter_config)

    @property
    def base(self) -> str:
        """The directory or hub id of the adapter's base model; of a model itself."""
        return self.adapter_config.get("base_model_name_or_path", self.path)

    @cached_property
    def adapter_facts(self) -> Dict[str, str]:
        """What model.lora wrote into an adapter's file next to its weights; {} where there is none."""
        return (read_header(self.directory / ADAPTER) or {}).get("__metadata__", {})

    @cached_property
    def run(self) -> dict:
        """run.json of the training that saved it; {} where there is none, or one of another tool."""
        run = read_json(self.directory / RUN)
        is_ours = isinstance(run.get("options"), dict) and isinstance(run.get("dataset"), dict)
        return run if is_ours else {}

    @property
    def template(self) -> Optional[str]:
        """The name of the prompt template that it was trained with; None where nothing says so."""
        return self.adapter_facts.get("template") or self.run.get("dataset", {}).get("template")

    @property
    def base_bits(self) -> Optional[int]:
        """The bits in which the adapter's base model was in the training; None where nothing says so."""
        bits = self.adapter_facts.get("base_bits")
        return None if bits is None else int(bits)

    @property
    def leaves_base_unchanged(self) -> bool:
        """Whether its base model is as it was while the adapter is switched off. Not if biases were trained, and not
        with PiSSA and others, which take a part of the base's weights away where the adapter starts."""
        config = self.adapter_config
        starts_apart = config.get("init_lora_weights", True) in (True, False, "gaussian")
        return config.get("peft_type") == "LORA" and config.get("bias", "none") == "none" and starts_apart

    def has_not_seen(self, dataset_meta: dict) -> bool:
        """Whether the held-out rows of the dataset file with this meta are new to the model, because its training, and
        those of the models that it was made of, had this file and no other one."""
        runs: List[dict] = []
        source = self
        while source.run and source.run not in runs:
            runs.append(source.run)
            source = ModelSource(source.run["options"].get("model_name_or_path", ""))
        return bool(runs) and all(run["dataset"].get("sha256") == dataset_meta["sha256"] for run in runs)

    @cached_property
    def config(self) -> dict:
        """config.json as it is written; {} of a hub id."""
        return read_json(self.directory / "config.json")

    @property
    def end_tokens(self) -> List[int]:
        """The ids at which its answers end, by generation_config.json or config.json; of an adapter those that it has
        learned, and its base model's. [] of a hub id."""
        if self.is_adapter:
            return self.run.get("dataset", {}).get("end_tokens", []) + ModelSource(self.base).end_tokens
        ids = read_json(self.directory / "generation_config.json").get("eos_token_id")
        if ids is None:
            ids = self.config.get("eos_token_id")
        if ids is None:
            return []
        return ids if isinstance(ids, list) else [ids]

    @property
    def safetensors_files(self) -> List[Path]:
        """The files that transformers reads: model.safetensors, or else the shards."""
        single = self.directory / "model.safetensors"
        return [single] if single.is_file() else sorted(self.directory.glob("model-*.safetensors"))

    @cached_property
    def tensors(self) -> Dict[str, dict]:
        """{name: {"dtype": "F32", "BF16", ..., "shape": [...]}} of its safetensors files; {} of other files."""
        tensors = {}
        for file in self.safetensors_files:
            tensors.update(read_header(file) or {})
        tensors.pop("__metadata__", None)
        return tensors

    @property
    def bytes_of_weights(self) -> int:
        """The size of the weight files; 0 of a hub id."""
        files = self.safetensors_files or self.directory.glob("pytorch_model*.bin")
        return sum(file.stat().st_size for file in files)


# ------------------------------------------------------------------------------------------------ is all of it there?


def require_model(model_dir: str, hint: str = "", template: Optional[Callable] = None) -> None:
    """UserError, which ends with `hint`, unless `model_dir` is a directory with all its weights, or a hub id.

    Of an adapter, its base model is checked too. template: the prompt template that it must have been trained with.
    """
    source = ModelSource(model_dir)
    require_directory(model_dir, hint)
    if source.is_adapter:
        _check_file(source.directory / ADAPTER, "train the adapter again")
        hint = (
            f"it is the base model of the adapter {model_dir}. Download it again, or write where it is into "
            f"base_model_name_or_path of {model_dir}/adapter_config.json"
        )
        require_directory(source.base, hint)
    if Path(source.base).is_dir():
        check_weights(source.base, hint or "download the model again")
    if template and source.template not in (None, template.__name__):
        raise UserError(
            f"{model_dir} was trained with the prompt template {source.template}, and this script uses "
            f"{template.__name__}. Use the inference script of its tutorial."
        )


def require_adapter(adapter_dir: str) -> None:
    """UserError unless `adapter_dir` is an adapter's directory, and its base model is there."""
    require_model(adapter_dir)
    if not ModelSource(adapter_dir).is_adapter:
        raise UserError(f"{adapter_dir} is not an adapter: give the directory of one, which --use-lora saves")


def require_directory(model_dir: str, hint: str = "") -> None:
    """UserError unless `model_dir` is a directory, or looks like a hub id (`owner/name`) and no such path exists."""
    path = Path(model_dir)
    hint = hint or "give it with --model-name-or-path"
    if path.exists() and not path.is_dir():
        raise UserError(f"The model directory {model_dir} is a file, not a directory: {hint}")
    if not path.exists() and (path.parent.is_dir() or not is_hub_id(model_dir)):
        raise UserError(f"The model directory {model_dir} does not exist: {hint}")


def check_weights(model_dir: str, hint: str = "run the download command again") -> None:
    """UserError, which ends with `hint`, unless all weight files are there and none is truncated."""
    directory = Path(model_dir)
    if not (directory / "config.json").is_file():
        raise UserError(f"{model_dir} is not a model directory, it has no config.json: {hint}")
    for name in ("model.safetensors", "pytorch_model.bin"):  # the order in which transformers looks for them
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return _check_file(directory / name, hint)
        if index.is_file():
            file_of_tensor = read_json(index).get("weight_map")
            if not isinstance(file_of_tensor, dict):
                raise UserError(f"{index} is damaged: delete it and {hint}")
            for file in sorted(set(file_of_tensor.values())):
                _check_file(directory / file, hint)
            return None
    raise UserError(f"{model_dir} has no weights (model.safetensors or pytorch_model.bin, or their index): {hint}")


def _check_file(path: Path, hint: str) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing: {hint}")
    if path.suffix == ".safetensors":
        is_complete = read_header(path) is not None
    else:
        with path.open("rb") as file:  # a zip file, whose table of contents comes last; before torch 1.6 a pickle
            is_complete = file.read(1) == b"\x80" or zipfile.is_zipfile(path)
    if not is_complete:
        raise UserError(f"{path} is truncated or damaged: delete it and {hint}")


def read_header(path: Path) -> Optional[dict]:
    """The header of a safetensors file, {tensor: {"dtype", "shape", "data_offsets"}}; None of a damaged file.

    The format: https://huggingface.co/docs/safetensors/index#format
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            # 8 bytes, little endian: the header's length. Then the header, as JSON, and the tensors.
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > size:
                return None
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return header if size == 8 + length + max(ends, default=0) else None
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


# ------------------------------------------------------------------------------------------------ where it comes from


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name))


def write_origin(model_dir: str, name: str, revision: str) -> None:
    """Record that the model in `model_dir` is `name` on the hub, in this revision."""
    record = {"name": name, "revision": revision, "weights": weights_fingerprint(model_dir)}
    with atomic_write(Path(model_dir) / ORIGIN) as new:
        new.write_text(json.dumps(record), encoding="utf-8")


def read_origin(model_dir: str) -> dict:
    """{"name": its id on the hub, "revision"} of a model's directory, {"name"} of a hub id; {} where it is not known.

    Where the weights have changed since the download, the model is another one, and its origin is not known.
    """
    path = Path(model_dir)
    if not path.exists():
        return {"name": model_dir} if is_hub_id(model_dir) else {}
    record = read_json(path / ORIGIN)
    if not record or record.pop("weights", None) != weights_fingerprint(model_dir):
        return {}
    return record


def base_models(model_dir: str, merged: Optional[str] = None) -> dict:
    """For run.json: {"base"}, with "adapter" where one was trained further, and "merged" where it was merged."""
    source = ModelSource(merged or model_dir)
    models: dict = {"base": source.base}
    if source.is_adapter:
        models["adapter"] = source.path
    if merged:
        models["merged"] = True
    return models


def positions_and_embeddings(model_dir: str) -> Tuple[Optional[int], Optional[int]]:
    """The maximum number of tokens in a sequence, and the size of the vocabulary; None where the config has none.

    UserError for an encoder-decoder model.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(ModelSource(model_dir).base, trust_remote_code=False)
    if config.is_encoder_decoder:
        kind = f"an encoder-decoder model ({config.model_type})"
        raise UserError(f"{model_dir} is {kind}. Use a causal language model (Llama, Mistral, GPT).")
    text_config = getattr(config, "text_config", config)  # of a model that also reads images
    return getattr(text_config, "max_position_embeddings", None), getattr(text_config, "vocab_size", None)


def explain_load_error(error: Exception) -> str:
    """Why a model's files could not be loaded, and what to do; "" where the error is not a known one."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return install_hint(error.name)
    if isinstance(error, ImportError):
        return f"{short_message(error)} Install that package."
    if "trust_remote_code" in text or "custom code" in text:
        return "it requires trust_remote_code, which these scripts never allow. Use a model that transformers supports."
    if "Unrecognized configuration class" in text:
        return "it is not a causal language model. Use one (Llama, Mistral, GPT)."
    if "not recognize this architecture" in text or "quantization" in text:
        reason = short_message(error, 100)
        return f"the installed transformers does not support it ({reason}...). Run: pip install -U transformers"
    if "mismatch" in text:
        return f"config.json and weights are of different models ({short_message(error, 100)}...). Download both again."
    return ""
