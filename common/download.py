"""A model from the Hugging Face hub into a directory, and the check that its weights are all there.

`download_model` streams files straight to disk: a 132 GB model needs 132 GB of disk and almost no memory, and the same
command run again fetches only what is missing. `check_weights` reads the headers of the weight files and never the
weights, so it costs nothing before a training either. Neither imports torch.

huggingface_hub: https://huggingface.co/docs/huggingface_hub/guides/download (tested from 0.23 to 2.4)
safetensors, the format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import signal
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

from common import UserError

# The weights as transformers finds them: the first kind that a repository has, and no other. So no twin in another
# format is fetched (.pth, .h5, .msgpack, .onnx, .gguf, consolidated.safetensors) and no folder such as original/.
WEIGHTS = (
    r"model\.safetensors",
    r"model[-_]\d+-of-\d+\.safetensors",
    r"pytorch_model\.bin",  # Cerebras-GPT has only these
    r"pytorch_model[-_]\d+-of-\d+\.bin",
)
# Beside the weights: config, tokenizer, chat template, code, licence, readme.
SMALL_FILES = r"[^/]+\.(json|txt|model|jinja|py|md)|LICEN[CS]E|NOTICE"

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
AGAIN = "run the same command again (files that are complete are kept)"


def download_model(repo_id, save_dir, token=None):
    """Download what transformers needs of the model `repo_id` ("owner/name") into the directory `save_dir`.

    token: an access token of the hub; without one the library looks for HF_TOKEN and for an earlier `hf auth login`.
    Raises UserError where the hub, the token or the disk is in the way. Files that had come before that stay.
    """
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, snapshot_download
    from huggingface_hub.utils import enable_progress_bars

    token = (token or "").strip() or None
    if token and not re.fullmatch("[!-~]+", token):  # a placeholder pasted as it is: no HTTP header can carry it
        raise UserError(f"--token is not an access token: copy yours from {TOKENS_PAGE} and run again")

    with _one_line_errors(repo_id, save_dir, token):
        target = Path(save_dir).expanduser().absolute()
        new_dirs = [path for path in (target, *target.parents) if not path.exists()]
        existing = new_dirs[-1].parent if new_dirs else target
        if not existing.is_dir():
            raise UserError(f"cannot save a model in {save_dir}: {existing} is a file. Choose another --save-dir")
        timeout = constants.HF_HUB_ETAG_TIMEOUT  # seconds; without one, an address that never answers would hang
        info = HfApi().model_info(repo_id, files_metadata=True, timeout=timeout, token=token)
        on_hub = {file.rfilename: file.size or 0 for file in info.siblings}  # name -> bytes
        names = _choose(repo_id, on_hub)
        # Everyone may see the list of a gated model, but not its files: ask for one before anything is made on disk.
        get_hf_file_metadata(hf_hub_url(repo_id, names[-1], revision=info.sha), token=token, timeout=timeout)

    strangers = {path.name for path in target.glob("*") if path.suffix in (".safetensors", ".bin", ".model", ".json")}
    strangers -= set(on_hub)
    if strangers:  # from_pretrained would mix the two, it takes a model.safetensors before the shards beside it
        raise UserError(
            f"{save_dir} holds {min(strangers)}, which is not of {repo_id} (of a --tiny stand-in or another model?): "
            "delete that directory or choose another --save-dir, and run again"
        )
    missing = [name for name in names if not _complete(target / name, on_hub[name])]
    needed = sum(on_hub[name] for name in missing) - _bytes_of_partial_files(target)
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{repo_id} needs {_gb(needed)} more in {save_dir}, and that disk has {_gb(free)} free: "
            "free some space or choose another disk with --save-dir, and run again"
        )

    print(f"Downloading {repo_id} ({_gb(sum(on_hub[name] for name in names))}) to {save_dir}...", flush=True)
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:  # else it is the reader's own wish
        enable_progress_bars()

    def stop(*_):
        _bytes_of_partial_files(target, age=0)
        _remove_if_empty(target, new_dirs)
        print("\nInterrupted: files that are complete are kept. Run the same command to go on.", file=sys.stderr)
        os._exit(130)

    default = signal.signal(signal.SIGINT, stop)  # the library would first let all running transfers end, many GB
    try:
        with _one_line_errors(repo_id, save_dir, token):
            for name in missing:  # the library may take a file that was cut short but kept its date for the whole one
                (target / name).unlink(missing_ok=True)
            patterns = [glob.escape(name) for name in names]
            snapshot_download(repo_id, revision=info.sha, local_dir=target, token=token, allow_patterns=patterns)
    finally:
        signal.signal(signal.SIGINT, default)
        _remove_if_empty(target, new_dirs)
    for name in missing:  # where the hub goes away in between, the library takes a directory as it is for the whole
        if not _complete(target / name, on_hub[name]):
            raise UserError(f"{target / name} has not come in full: {AGAIN}")
    check_weights(save_dir, hint="run the same command again")
    print(f"Model saved in {save_dir}", flush=True)


def check_weights(model_dir, hint="run the download command again"):
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
            shards = {}  # file name -> names of its tensors
            try:
                for tensor, shard in json.loads(index.read_bytes())["weight_map"].items():
                    shards.setdefault(str(shard), set()).add(tensor)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(f"{index} is damaged: delete it and {hint}") from None
            for shard, tensors in sorted(shards.items()):
                _check_file(directory / shard, tensors, hint)
            return None
    raise UserError(f"{model_dir} has no weights (model.safetensors or pytorch_model.bin, or their index): {hint}")


def base_of(model_dir: str) -> str:
    """The model on which `model_dir`, an adapter's directory, was trained, by its adapter_config.json; of a whole model
    itself. UserError where that file is damaged."""
    config = Path(model_dir) / "adapter_config.json"
    if not config.is_file():
        return model_dir
    try:
        base = json.loads(config.read_bytes())["base_model_name_or_path"]
    except (ValueError, TypeError, KeyError):
        base = None
    if not (base and isinstance(base, str)):
        raise UserError(f"{config} is damaged: train the adapter again")
    return base


def require_model(model_dir: str, hint: str = "") -> None:
    """UserError, ending in `hint`, unless `model_dir` is a directory with all its weights, or a hub id.

    Of an adapter's directory its own weights and those of its base are checked.
    """
    require_model_directory(model_dir, hint)
    base = base_of(model_dir)
    if base != model_dir:
        _check_file(Path(model_dir) / "adapter_model.safetensors", set(), "train the adapter again")
        hint = (
            f"it is the base of the adapter {model_dir}. Download it again, or write where it is into "
            f"base_model_name_or_path of {model_dir}/adapter_config.json"
        )
        require_model_directory(base, hint)
    if Path(base).is_dir():
        check_weights(base, hint=hint or "download the model again")


def require_adapter(adapter_dir: str) -> None:
    """UserError unless `adapter_dir` is an adapter's directory, and its base is there."""
    require_model(adapter_dir)
    if base_of(adapter_dir) == adapter_dir:
        raise UserError(f"{adapter_dir} is a whole model: give the directory of an adapter, which --use-lora saves")


def require_model_directory(model_dir: str, hint: str = "") -> None:
    """UserError unless `model_dir` is a directory, or looks like a hub id (`owner/name`) and no such path exists."""
    path = Path(model_dir)
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model_dir) and not path.parent.is_dir()
    if not path.is_dir() and (path.exists() or not hub_id):
        what = "is a file, not a directory" if path.exists() else "does not exist"
        raise UserError(f"the model directory {model_dir} {what}: {hint or 'give it with --model-name-or-path'}")


def _check_file(path, tensors, hint):
    """Check one file of weights. tensors: names that must be in it (only a safetensors file tells them unloaded)."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {hint}")
    damaged = UserError(f"{path} is cut short or damaged: delete it and {hint}")
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            # torch >= 1.6 writes a zip file, its table of contents last; before, a pickle
            start = file.read(2)
            if not (zipfile.is_zipfile(path) if start == b"PK" else start[:1] == b"\x80"):
                raise damaged
            return
        # 8 bytes, little endian: the header's length; the header, JSON {tensor: {"data_offsets": [begin, end]}}; data
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size or length > 100_000_000:  # the format's own limit
            raise damaged
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            expected = 8 + length + max([entry["data_offsets"][1] for entry in header.values()], default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise damaged from None
    if size != expected:
        raise damaged
    if tensors - set(header):
        raise UserError(f"{path} lacks the tensor {min(tensors - set(header))}: delete it and {hint}")


def _choose(repo_id, on_hub):
    """The names that `download_model` fetches, out of the repository's: the small files, and the weights once."""
    weights = next(filter(None, ([n for n in on_hub if re.fullmatch(kind, n)] for kind in WEIGHTS)), None)
    if not weights:
        raise UserError(f"{repo_id} has no weights that transformers reads as they are: choose another model")
    index = re.sub(r"[-_]\d+-of-\d+", "", weights[0]) + ".index.json"  # which tensor is in which shard
    small = [n for n in on_hub if re.fullmatch(SMALL_FILES, n) and (n == index or not n.endswith(".index.json"))]
    return small + weights


def _complete(path, size):
    return path.is_file() and path.stat().st_size == size


def _gb(size):
    return f"{size / 1e9:.1f} GB"


def _bytes_of_partial_files(target, age=60):
    """Bytes of half-fetched files with which the library goes on; removes those with which it never will.

    Newer releases give them a random name and begin anew. One written to less than `age` seconds ago may be in use.
    """
    total = 0
    for path in target.glob(".*/**/*.incomplete"):
        if not re.search(r"\.[0-9a-f]{8}\.incomplete$", path.name):
            total += path.stat().st_size
        elif time.time() - path.stat().st_mtime >= age:
            path.unlink()
    return total


def _remove_if_empty(target, new_dirs):
    """Remove the directories `new_dirs` that were made for `target`, if it holds but the library's own records."""
    files = [path for path in target.rglob("*") if path.is_file() and path.stat().st_size]
    if any(path.suffix == ".incomplete" or path.relative_to(target).parts[0][0] != "." for path in files):
        return
    if new_dirs:
        shutil.rmtree(new_dirs[-1], ignore_errors=True)


@contextmanager
def _one_line_errors(repo_id, save_dir, token):
    """Any error of huggingface_hub as a UserError: their classes, and those of the HTTP library, change by release."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_explain(error, repo_id, save_dir, token)) from None


def _explain(error, repo_id, save_dir, token):
    """The line for `error`: what is wrong, why, what to do next."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError

    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not a name on the hub: give --model-name as owner/name"
    chain = [error]  # what caused it comes after it
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    for e in chain:
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(e):
            return f"the disk of {save_dir} is full: free some space, then {AGAIN}"
        if isinstance(e, OSError) and e.filename is not None:
            return f"cannot write {e.filename}: {e.strerror}. Mend that or choose another --save-dir, and run again"

    response = next((e.response for e in chain if getattr(e, "response", None) is not None), None)
    if response is not None and str(response.url).startswith(constants.ENDPOINT + "/"):
        page, status = f"https://huggingface.co/{repo_id}", response.status_code
        has_token = bool(token or get_token())
        if status == 401 and has_token:
            return (
                "the hub does not know the token (from --token, HF_TOKEN or an earlier login): "
                f"create one at {TOKENS_PAGE} and run again with --token <your token>"
            )
        if status == 401 and response.headers.get("X-Error-Code") == "GatedRepo":
            return (
                f"{repo_id} is gated and there is no token: accept its licence at {page}, "
                f"create a token at {TOKENS_PAGE} and run again with --token <your token>"
            )
        if status == 403:
            return (
                f"the token's account may not download {repo_id} yet: accept the licence at {page} and run again "
                "(it can take hours to be granted; a fine-grained token also needs the right to read gated models)"
            )
        if status in (401, 404):
            private = "private" if has_token else "private and there is no token"
            return (
                f"{constants.ENDPOINT} has no model {repo_id}, or it is {private}: "
                "check --model-name, or give the --token of an account that may read it"
            )
    reason = (str(chain[-1]).strip() or type(chain[-1]).__name__).splitlines()[0][:200]
    return (
        f"the download from {constants.ENDPOINT} failed ({reason}): check the network, then {AGAIN}; "
        "to rehearse without a network, use --tiny"
    )
