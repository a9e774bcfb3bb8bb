"""Saves a trained model, so that plain transformers (4.40 or newer) loads it; of an adapter, the adapter alone.

Tensors are written under the names and in the types of the base model's files. Whatever the number of processes, they
are gathered one by one on rank 0, and written in files of at most 5 GB: rank 0 needs no more memory than that.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from common import distributed
from common.checkpoint import list_checkpoints
from common.dataset_file import stop_token_ids
from common.device import free_memory
from common.support.exit import UserError, disk_problem, is_out_of_memory, short_message, without_secrets
from common.support.files import atomic_directory
from common.support.model_dir import RUN, ModelSource
from common.tokenization import fingerprint, load_tokenizer
from model.fsdp import without_weights
from model.load import open_checked
from model.lora import open_adapter, save_adapter
from model.loss import CausalLMLoss
from model.probe import largest_difference, logits_of, probe_ids
from model.weight_format import DTYPE, DTYPES, WeightFormat, bytes_of, detect_format

MAX_FILE_BYTES = 5 * 10**9  # as transformers' save_pretrained has it
# What an earlier model may have left in the directory, and would be loaded together with the new files.
MODEL_FILES = (
    "*config.json", "model*.safetensors*", "adapter_model.*", "pytorch_model*", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "additional_chat_templates",
)  # fmt: skip
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
# The files of a tokenizer; each kind of tokenizer has some of them.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", *CHAT_TEMPLATES,
)  # fmt: skip


def save_model(model: nn.Module, tokenizer, save_dir: str, base: str = "", run: Optional[dict] = None) -> None:
    """Save the model (with or without its loss), its tokenizer and its model card in `save_dir`.

    base: the directory of the base model, whose tensor types are restored; without it the types stay as they are. run:
    what run.json shall say, which common.trainer.train returns. All of it is written, compared with the model in
    memory, and then takes the place of an earlier model in one step. Raises UserError where the disk is full or the
    files differ from the model: then the directory is as it was before. `model` is not changed.
    """
    print("Saving Model...")
    network = model.model if isinstance(model, CausalLMLoss) else model
    can_ask = distributed.world_size() == 1 and not getattr(model, "static_shapes", False)
    # A finished run needs its checkpoints no longer. They go in the same step in which the model comes.
    checkpoints = [path.name for path in list_checkpoints(save_dir)] if run else []
    stale = (*MODEL_FILES, *checkpoints, "evaluation.json", "evaluation.png")  # of the model that was there
    try:
        with distributed.on_main_process(lambda: atomic_directory(save_dir, stale)) as new:
            _write_files(network, tokenizer, new, save_dir, base, run or {})
            if distributed.is_main_process():
                check_opens(new, network, can_ask)
    except Exception as error:  # safetensors has an exception of its own for a full disk
        if not disk_problem(error):
            raise
        raise UserError(
            f"Cannot write {save_dir}: {disk_problem(error)}. Free disk space there and run the same command again."
        ) from None
    print(f"Model saved in {save_dir}")


def _write_files(model: nn.Module, tokenizer, directory: Path, save_dir: str, base: str, run: dict) -> None:
    meta = run.get("dataset", {})
    ends = stop_token_ids(meta, tokenizer, model)
    is_adapter = hasattr(model, "get_base_model")  # in peft 0.17 a merged model still has a `peft_config`
    if not is_adapter:
        weight_format = detect_format(base) if base else None
        write_weights(model, directory, weight_format)
    if not distributed.is_main_process():
        return
    if is_adapter:
        save_adapter(model, directory, meta.get("template", ""))
    else:
        write_configs(model, tokenizer, ends, directory, base, weight_format)
    save_tokenizer(tokenizer, directory, meta.get("chat_template"))
    if run:
        finished = {**run, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        text = without_secrets(json.dumps(finished, indent=2, ensure_ascii=False))
        (directory / RUN).write_text(text, encoding="utf-8")
    if run or base:
        _write_card(model, directory, save_dir, base, run, ends)
    mode = min(directory.glob("*config.json")).stat().st_mode
    for file in directory.iterdir():
        file.chmod(mode)  # safetensors makes its files readable by their owner only


def _write_card(model: nn.Module, directory: Path, save_dir: str, base: str, run: dict, ends: List[int]) -> None:
    from model.model_card import write_card  # not at the top: a learner who follows the first step need not read it

    adapter_for = type(model.get_base_model()).__name__ if hasattr(model, "get_base_model") else ""
    meta = run.get("dataset", {})
    has_chat_template = bool(meta.get("chat_template", meta.get("template") == "chat"))
    made_of = run.get("made_of")
    if not made_of:
        made_of = {"base": base or model.name_or_path}
    try:
        write_card(directory, save_dir, made_of, run, adapter_for, has_chat_template, ends)
    except OSError:
        raise
    except Exception as error:  # a missing card is no reason to lose a trained model
        print(f"The model card was not written: {short_message(error)}")


def check_opens(directory: Path, model: nn.Module, can_ask: bool) -> None:
    """UserError unless plain transformers (and peft) opens the model and the tokenizer in `directory`.

    An adapter is opened on its base model without weights. can_ask: whether `model` can compute logits, which the
    opened one must have too, if it is in float32. They are computed with its weights, because those in the files are
    rounded. This takes main memory for the model in float32; where that is not free, only the config is opened.
    """
    logging.disable_progress_bar()  # what is loaded here is no news
    try:
        AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        if hasattr(model, "get_base_model"):
            base_config = AutoConfig.from_pretrained(ModelSource(str(directory)).base, trust_remote_code=False)
            with without_weights(torch.float32):
                base = AutoModelForCausalLM.from_config(base_config, trust_remote_code=False)
            open_adapter(base, str(directory))
            return
        AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if not can_ask or 1.2 * 4 * model.num_parameters() > free_memory():
            return
        opened = open_checked(str(directory), {DTYPE: torch.float32})
        opened.load_state_dict(model.state_dict())
    except Exception as error:  # each part has exceptions of its own
        if is_out_of_memory(error):
            return
        require_saved(False, f"transformers cannot open them ({short_message(error)})")
    if all(weight.dtype == torch.float32 for weight in model.parameters()):
        expected = logits_of(model, probe_ids(model, 12))
        difference = largest_difference(logits_of(opened, probe_ids(opened, 12)), expected)
        require_saved(difference < 0.01, f"their logits differ by {difference:.0%} of the largest one")


# ------------------------------------------------------------------------------------------------ weights


class Weight(NamedTuple):
    """A tensor of the model, whole or in shards, and the type in which it is saved."""

    tensor: torch.Tensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * bytes_of(self.dtype)

    def gather(self) -> torch.Tensor:
        """The whole tensor on the CPU of rank 0, an empty one on other ranks. All ranks must call it."""
        tensor = self.tensor.detach()
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        return tensor.to("cpu", self.dtype).contiguous() if distributed.is_main_process() else torch.empty(0)


def write_weights(model: nn.Module, directory: Path, weight_format: Optional[WeightFormat]) -> None:
    """Write model.safetensors, or several files and their index. All ranks must call it; rank 0 writes.

    Raises on rank 0 OSError where it cannot write, and UserError where the files are not what is in memory.
    """
    weights = weights_to_save(model, weight_format)
    files = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda weight: weight.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_FILE_BYTES,
    )
    problem: Optional[Exception] = None
    for file, names in files.filename_to_tensors.items():
        tensors = {name: weights[name].gather() for name in names}
        if distributed.is_main_process() and not problem:
            try:
                save_file(tensors, directory / file, metadata={"format": "pt"})
                _check_values(directory / file, tensors)
            # It is raised when the other ranks have finished gathering.
            except SafetensorError as error:
                problem = OSError(short_message(error))
            except (OSError, UserError) as error:
                problem = error
    if problem:
        raise problem
    if not distributed.is_main_process():
        return
    if files.is_sharded:
        content = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        index = json.dumps(content, indent=2, sort_keys=True)
        (directory / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")
    _check_headers(directory, weights)
    num_saved = sum(weight.tensor.numel() for weight in weights.values())
    num_live = sum(tensor.numel() for tensor in _unique(model.state_dict(keep_vars=True)).values())
    require_saved(num_saved == num_live, f"it has {num_saved} weights instead of {num_live}")


@torch.no_grad()
def weights_to_save(model: nn.Module, weight_format: Optional[WeightFormat]) -> Dict[str, Weight]:
    """The tensors of the model under their names in files; of tied ones the first. Without a format in their types."""
    state = model.state_dict(keep_vars=True)
    tensors = _unique(state)
    if distributed.world_size() == 1:
        try:
            # transformers 5 holds all experts of a layer as one tensor, and the files each expert's own.
            from transformers.core_model_loading import revert_weight_conversion

            tensors = revert_weight_conversion(model, tensors)
        except ImportError:
            pass
    stored: Dict[tuple, torch.dtype] = {}
    for name, dtype in (weight_format.dtypes if weight_format else {}).items():
        tensor = tensors.get(name, state.get(name))  # a tied tensor may be stored under another of its names
        if tensor is not None:
            stored[_identity(tensor)] = dtype
    weights = {}
    for name, tensor in tensors.items():
        dtype = tensor.dtype
        if weight_format and tensor.is_floating_point():
            dtype = stored.get(_identity(tensor)) or weight_format.main_dtype or dtype
        weights[name] = Weight(tensor, dtype)
    return weights


def _unique(tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Tied tensors once, under the first of their names."""
    first_names: Dict[tuple, str] = {}
    for name, tensor in tensors.items():
        first_names.setdefault(_identity(tensor), name)
    return {name: tensors[name] for name in first_names.values()}


def _identity(tensor: torch.Tensor) -> tuple:
    """The same for two names of one tensor. An empty shard has no memory of its own, so there the object counts."""
    return (id(tensor),) if hasattr(tensor, "full_tensor") else (tensor.data_ptr(), tensor.shape)


def _check_values(file: Path, tensors: Dict[str, torch.Tensor]) -> None:
    """Compare one tensor in a hundred with what was written."""
    with safe_open(str(file), "pt") as opened:
        for name in sorted(tensors)[::100]:
            require_saved(name in opened.keys(), f"{name} is missing")  # noqa: SIM118, it is no dict
            require_saved(torch.equal(opened.get_tensor(name), tensors[name]), f"{name} has other values")


def _check_headers(directory: Path, weights: Dict[str, Weight]) -> None:
    """Compare names, shapes and types of all tensors with what was written."""
    saved = ModelSource(directory).tensors
    differ = sorted(saved.keys() ^ weights.keys())
    for name in saved.keys() & weights.keys():
        tensor, dtype = weights[name]
        same_dtype = DTYPES.get(saved[name]["dtype"], dtype) == dtype
        if saved[name]["shape"] != list(tensor.shape) or not same_dtype:
            differ.append(name)
    require_saved(not differ, f"{differ[:1]} differs")


def require_saved(condition: bool, problem: str) -> None:
    """UserError, with the `problem`, unless what was written is the model."""
    if not condition:
        raise UserError(
            f"The files are not the trained model: {problem}. Nothing was replaced. Please report this, with the "
            "versions of torch, transformers and safetensors."
        )


# ------------------------------------------------------------------------------------------------ configs


def write_configs(
    model: nn.Module, tokenizer, ends: List[int], directory: Path, base: str, weight_format: Optional[WeightFormat]
) -> None:
    """Write config.json and generation_config.json. ends: the tokens at which an answer ends."""
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]  # plain transformers stops there, too
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    main_dtype = weight_format.main_dtype if weight_format else None
    add_old_config_keys(directory, model.config.to_dict(), base, main_dtype or next(model.parameters()).dtype)


def add_old_config_keys(directory: Path, settings: dict, base: str, dtype: torch.dtype) -> None:
    """Add to config.json the keys that releases before transformers 5 read: the base model's, or made of the new ones.

    They would ignore `rope_parameters`, and compute with a rope_theta of 10000 without an error. settings: those of the
    model in memory; where one differs from the base model's, as of a merged model that is no longer tied, it counts.
    """
    path = directory / "config.json"
    config = json.loads(path.read_bytes())
    base_config = ModelSource(base).config if base else {}
    if base_config.get("model_type") != config.get("model_type"):
        # Of a model that reads images too, this is the language model alone (Qwen3.5).
        base_config = base_config.get("text_config") or {}
    for key in ("quantization_config", "compression_config", "transformers_version", "auto_map", "_name_or_path"):
        base_config.pop(key, None)
    _add_old_keys(config, settings, base_config)
    text_config = config.get("text_config")
    base_text_config = base_config.get("text_config")
    if isinstance(text_config, dict) and isinstance(base_text_config, dict):
        _add_old_keys(text_config, settings["text_config"], base_text_config)
    config["dtype"] = config["torch_dtype"] = str(dtype).replace("torch.", "")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_old_keys(config: dict, settings: dict, base_config: dict) -> None:
    for key, value in base_config.items():
        config.setdefault(key, settings.get(key, value))
    rope = config.get("rope_parameters") or {}
    main_rope = rope.get("full_attention", rope)  # one for each kind of layer (Gemma 3), or one for all
    if isinstance(main_rope, dict) and "rope_theta" in main_rope:
        config.setdefault("rope_theta", main_rope["rope_theta"])
        kind = main_rope.get("rope_type", "default")
        if kind in ("linear", "dynamic"):  # releases before 4.43 accept these two keys and no others
            config.setdefault("rope_scaling", {"type": kind, "factor": main_rope["factor"]})
        elif kind in ("yarn", "longrope", "llama3"):
            scaling = {key: value for key, value in main_rope.items() if key != "rope_theta"}
            config.setdefault("rope_scaling", scaling)
    if "rope_theta" in rope.get("sliding_attention", {}):
        config.setdefault("rope_local_base_freq", rope["sliding_attention"]["rope_theta"])


# ------------------------------------------------------------------------------------------------ tokenizer


def save_tokenizer(tokenizer, directory: Path, chat_template: Optional[str] = None) -> None:
    """Save the tokenizer: its own files where it has not changed, readable for transformers before 5.

    chat_template: to be saved instead of the tokenizer's own one; "" for none, None for its own.
    """
    source = Path(tokenizer.name_or_path)
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if files and fingerprint(load_tokenizer(str(source))) == fingerprint(tokenizer):
        for file in files:
            shutil.copyfile(file, directory / file.name)
    else:
        tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    original = json.loads(path.read_bytes()) if path.is_file() else {}
    settings = dict(original)
    # An old release does not know the class TokenizersBackend of transformers 5. And transformers 5 chooses it for
    # Mistral by the config.json, which an adapter does not have: by the class in the hub's file, it would load another
    # tokenizer there, without the space between a special token and a text.
    by_config = type(tokenizer).__name__ == "TokenizersBackend" and not (directory / "config.json").is_file()
    if by_config or settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if chat_template is not None:
        for name in CHAT_TEMPLATES:  # transformers prefers them to the one in tokenizer_config.json
            (directory / name).unlink(missing_ok=True)
        shutil.rmtree(directory / "additional_chat_templates", ignore_errors=True)
        settings.pop("chat_template", None)
        if chat_template:
            settings["chat_template"] = chat_template
    if settings != original:
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
