"""Downloads a model from the Hugging Face hub into a directory, by huggingface_hub's own snapshot_download.

Files are streamed to the disk: a model of 132 GB needs 132 GB of disk and almost no memory. The same command run again
fetches only what is missing (https://huggingface.co/docs/huggingface_hub/guides/download).
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import signal
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Dict, List, Optional

from common.support.compat import load_mapped
from common.support.exit import STOP_SIGNALS, UserError, disk_problem, first_line
from common.support.files import atomic_write, require_disk_space, require_writable
from common.support.model_dir import check_weights, read_header, write_origin

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
AGAIN = "run the same command again (complete files are kept)"
INDEX = "model.safetensors.index.json"

# The weights as transformers looks for them: the first kind that a repository has, and no other. So no copy in another
# format is fetched (.pth, .h5, .msgpack, .onnx, .gguf, consolidated.safetensors), and no folder such as original/.
WEIGHTS = (
    r"model\.safetensors",
    r"model[-_]\d+-of-\d+\.safetensors",
    r"pytorch_model\.bin",  # Cerebras-GPT has only these
    r"pytorch_model[-_]\d+-of-\d+\.bin",
)
# Config, tokenizer, chat template, code, licence, readme.
SMALL_FILES = r"[^/]+\.(json|txt|model|jinja|py|md)|LICEN[CS]E|NOTICE"


def download_model(repo_id: str, save_dir: str, token: Optional[str] = None, convert: bool = False) -> None:
    """Download what transformers needs of the model `repo_id` ("owner/name") into the directory `save_dir`.

    token: an access token of the hub; without one the library uses HF_TOKEN, or an earlier `hf auth login`.
    convert: turn weights that come as .bin files into safetensors.
    UserError where the hub, the token or the disk refuses. Files that are complete by then stay.
    """
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, snapshot_download
    from huggingface_hub.utils import enable_progress_bars

    token = (token or "").strip() or None
    if token and not re.fullmatch("[!-~]+", token):  # a placeholder, which no HTTP header can carry
        raise UserError(f"--token is not an access token: copy yours from {TOKENS_PAGE} and run again")
    target = Path(save_dir).expanduser().absolute()

    with _one_line_errors(repo_id, save_dir, token):
        require_writable(target, "--save-dir")
        timeout = constants.HF_HUB_ETAG_TIMEOUT  # in seconds; without it an address that never answers would hang
        info = HfApi().model_info(repo_id, files_metadata=True, timeout=timeout, token=token)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        names = choose_files(repo_id, sizes)
        # Everybody may list the files of a gated model: ask for one of them before anything is made on the disk.
        get_hf_file_metadata(hf_hub_url(repo_id, names[-1], revision=info.sha), token=token, timeout=timeout)

    converted = {name_of_converted(name) for name in names if is_converted(target / name, sizes[name])}
    names = [name for name in names if name_of_converted(name) not in converted]
    _refuse_other_files(repo_id, save_dir, {*sizes, *converted, INDEX} if converted else set(sizes))
    missing = [name for name in names if not _is_complete(target / name, sizes[name])]
    needed = sum(sizes[name] for name in missing) - _bytes_of_parts(target)
    require_disk_space(needed, save_dir, f"What is missing of {repo_id}")

    print(f"Downloading {repo_id} ({sum(sizes[name] for name in names) / 1e9:.1f} GB) to {save_dir}...", flush=True)
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()
    with _one_line_errors(repo_id, save_dir, token), _stop_at_once():
        for name in missing:  # the library takes a truncated file with the old date for a complete one
            if (target / name).exists():
                (target / name).unlink()
        patterns = [glob.escape(name) for name in names]
        snapshot_download(repo_id, revision=info.sha, local_dir=target, token=token, allow_patterns=patterns)
    for name in missing:  # where the connection breaks off, the library may take the directory as it is
        if not _is_complete(target / name, sizes[name]):
            raise UserError(f"{target / name} is not complete: {AGAIN}")
    if convert:
        to_safetensors(target)
    check_weights(save_dir, hint="run the same command again")
    write_origin(str(target), repo_id, f"revision {info.sha}")
    print(f"Model saved in {save_dir}", flush=True)


def choose_files(repo_id: str, on_hub) -> List[str]:
    """The names that are fetched, of those in the repository: the small files, and the weights once, as the last."""
    for kind in WEIGHTS:
        weights = [name for name in on_hub if re.fullmatch(kind, name)]
        if weights:
            break
    else:
        raise UserError(f"{repo_id} has no weights that transformers can load: choose another model")
    index = re.sub(r"[-_]\d+-of-\d+", "", weights[0]) + ".index.json"  # which tensor is in which shard
    small = []
    for name in on_hub:
        is_other_index = name.endswith(".index.json") and name != index
        if re.fullmatch(SMALL_FILES, name) and not is_other_index:
            small.append(name)
    return small + weights


def _refuse_other_files(repo_id: str, save_dir: str, expected: set) -> None:
    """UserError where a file of another model is there: from_pretrained would load a mixture of the two."""
    for path in sorted(Path(save_dir).expanduser().glob("*")):
        if path.suffix in (".safetensors", ".bin", ".model", ".json") and path.name not in expected:
            raise UserError(
                f"{save_dir} contains {path.name}, which is not a file of {repo_id} (of a --tiny or another model?): "
                "delete that directory or choose another --save-dir, and run again"
            )


def _is_complete(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _bytes_of_parts(target: Path) -> int:
    """The size of the partial files that the library will resume. Those that it never will are removed."""
    size = 0
    for path in target.glob(".*/**/*.incomplete"):
        if re.search(r"\.[0-9a-f]{8}\.incomplete$", path.name):  # newer releases give them a random name
            path.unlink()
        else:
            size += path.stat().st_size
    return size


@contextmanager
def _stop_at_once():
    """Inside, Ctrl-C and SIGTERM end the process. The library would first finish all running transfers, many GB."""

    def stop(number, _):
        os.write(2, b"\nInterrupted. Complete files are kept. Run the same command again to continue.\n")
        os._exit(128 + number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, *STOP_SIGNALS)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ what the hub answers


@contextmanager
def _one_line_errors(repo_id: str, save_dir: str, token: Optional[str]):
    """Any error of huggingface_hub as a UserError: its classes, and those of the HTTP library, change by release."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_explain(error, repo_id, save_dir, token)) from None


def _explain(error: Exception, repo_id: str, save_dir: str, token: Optional[str]) -> str:
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError

    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not a name on the hub: give --model-name as owner/name"
    causes: List[BaseException] = [error]
    while causes[-1].__cause__ or causes[-1].__context__:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)
    for cause in causes:
        if disk_problem(cause) or "No space left" in str(cause):
            return f"the disk of {save_dir} is full: free disk space, then {AGAIN}"
        if isinstance(cause, OSError) and cause.filename is not None:
            return f"cannot write {cause.filename}: {cause.strerror}. Choose another --save-dir and run again"
        response = getattr(cause, "response", None)
        if response is not None and str(response.url).startswith(f"{constants.ENDPOINT}/"):
            is_gated = response.headers.get("X-Error-Code") == "GatedRepo"
            refusal = _explain_status(response.status_code, is_gated, repo_id, bool(token or get_token()))
            if refusal:
                return refusal
    reason = first_line(causes[-1])[:200]
    return (
        f"the download from {constants.ENDPOINT} failed ({reason}): check the network, then {AGAIN}; "
        "to rehearse without a network, use --tiny"
    )


def _explain_status(status: int, is_gated: bool, repo_id: str, has_token: bool) -> str:
    """What to do about an HTTP status of the hub; "" where it is another fault. It hides what a token may not see."""
    from huggingface_hub import constants

    page = f"https://huggingface.co/{repo_id}"
    if status == 401 and has_token:
        return (
            "the hub does not know the token (from --token, HF_TOKEN or an earlier login): "
            f"create one at {TOKENS_PAGE} and run again with --token <your token>"
        )
    if status == 401 and is_gated:
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
    return ""


def ask_hub(timeout: float) -> dict:
    """{"endpoint", "reachable", "token": "none", "accepted", "refused" or "not verified"}. The token is never shown."""
    try:
        from huggingface_hub import constants, get_token
        from huggingface_hub.utils import get_session  # the library's own connection: its proxies and certificates
    except ImportError:  # before the first pip install
        return {"endpoint": None, "reachable": False, "token": "none"}
    token = get_token()
    hub = {"endpoint": constants.ENDPOINT, "reachable": False, "token": "not verified" if token else "none"}
    headers = {"authorization": f"Bearer {token}"} if token and token.isascii() else {}

    def ask():
        with suppress(Exception):  # of the HTTP library, which changes by release
            status = get_session().get(f"{hub['endpoint']}/api/whoami-v2", headers=headers, timeout=timeout).status_code
            hub["reachable"] = status < 500
            if token:
                hub["token"] = {200: "accepted", 401: "refused"}.get(status, "not verified")

    # In a thread, because the timeout does not cover a name server that never answers.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return dict(hub)


# ------------------------------------------------------------------------------------------------ .bin to safetensors


def name_of_converted(name: str) -> str:
    """pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors"""
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def is_converted(path: Path, size: int) -> bool:
    """Whether the .bin file `path` of `size` bytes has been converted to a safetensors file, which is complete."""
    facts = (read_header(path.with_name(name_of_converted(path.name))) or {}).get("__metadata__", {})
    return path.suffix == ".bin" and (facts.get("made_of"), facts.get("bytes")) == (path.name, str(size))


def to_safetensors(directory: Path) -> None:
    """Convert the pytorch_model*.bin files of a directory to safetensors, and write an index where they are several.

    UserError where one cannot be read, or where the disk is full. The next call continues with that file.
    """
    for scratch in directory.glob(".model*.safetensors*.????????"):  # of a process that was killed
        shutil.rmtree(scratch, ignore_errors=True)
    for path in sorted(directory.glob("pytorch_model*.bin")):
        if not is_converted(path, path.stat().st_size):
            _convert(path)
        path.unlink()
    shards = sorted(directory.glob("model-*-of-*.safetensors"))
    if shards and not (directory / INDEX).is_file():
        _write_index(directory / INDEX, shards)


def _convert(path: Path) -> None:
    from safetensors.torch import save_file

    size = path.stat().st_size
    target = path.with_name(name_of_converted(path.name))
    require_disk_space(size, path.parent, target.name)
    print(f"Converting {path.name} to {target.name}...", flush=True)
    try:
        weights = load_mapped(path)
    except Exception:  # a damaged file fails in many ways, with many types
        raise UserError(f"{path} can't be read: delete it and run the same command again") from None
    seen = set()
    for name, weight in weights.items():  # safetensors refuses two names of one tensor
        weights[name] = weight.clone() if weight.data_ptr() in seen else weight.contiguous()
        seen.add(weight.data_ptr())
    with atomic_write(target) as new:
        save_file(weights, new, metadata={"format": "pt", "made_of": path.name, "bytes": str(size)})
        new.chmod(path.stat().st_mode)  # safetensors makes its files readable by their owner only


def _write_index(index: Path, shards: List[Path]) -> None:
    places: Dict[str, str] = {}
    size = 0
    for shard in shards:
        for name, entry in (read_header(shard) or {}).items():
            if name != "__metadata__":
                places[name] = shard.name
                size += entry["data_offsets"][1] - entry["data_offsets"][0]
    with atomic_write(index) as new:
        new.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2), encoding="utf-8")
