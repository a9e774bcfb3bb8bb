"""Downloads a model from the Hugging Face hub into a directory, by huggingface_hub's own snapshot_download.

Files are streamed to the disk: a model of 132 GB needs 132 GB of disk and almost no memory. The same command run again
fetches only what is missing (https://huggingface.co/docs/huggingface_hub/guides/download).
"""

from __future__ import annotations

import glob
import os
import re
import signal
from pathlib import Path
from typing import List, Optional

from common.support.compat import load_mapped
from common.support.exit import INTERRUPTED, UserError, disk_problem, first_line
from common.support.files import fsync, require_disk_space, require_writable
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
    token = (token or "").strip() or None
    if token and not token.isascii():  # a placeholder, which no HTTP header can carry
        raise UserError(f"--token is not an access token: copy yours from {TOKENS_PAGE} and run again")
    require_writable(save_dir, "--save-dir")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_at_once)
    try:
        revision = _download(repo_id, save_dir, token)
    except UserError:
        raise
    except Exception as error:  # classes of huggingface_hub and of its HTTP library, which change by release
        raise UserError(_explain(error, repo_id, save_dir, token)) from None
    if convert:
        to_safetensors(Path(save_dir))
    check_weights(save_dir, hint="run the same command again")
    write_origin(save_dir, repo_id, f"revision {revision}")
    print(f"Model saved in {save_dir}", flush=True)


def _stop_at_once(number, _):
    """End the process at Ctrl-C or SIGTERM. The library would first finish all running transfers, many GB."""
    os.write(2, f"\n{INTERRUPTED}\n".encode())
    os._exit(128 + number)


def _download(repo_id: str, save_dir: str, token: Optional[str]) -> str:
    """Fetch the files that are not complete yet; the revision that they are of, a commit's hash."""
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, snapshot_download

    target = Path(save_dir)
    timeout = constants.HF_HUB_ETAG_TIMEOUT  # in seconds; without it an address that never answers would hang
    info = HfApi().model_info(repo_id, files_metadata=True, timeout=timeout, token=token)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    names = choose_files(repo_id, sizes)
    # Everybody may list the files of a gated model: ask for one of them before anything is made on the disk.
    get_hf_file_metadata(hf_hub_url(repo_id, names[-1], revision=info.sha), token=token, timeout=timeout)

    converted = [name for name in names if is_converted(target / name, sizes[name])]
    _refuse_other_files(repo_id, target, {*sizes, INDEX, *map(name_of_converted, converted)})
    names = [name for name in names if name not in converted]
    missing = [name for name in names if not _is_complete(target / name, sizes[name])]
    require_disk_space(sum(sizes[name] for name in missing), save_dir, f"What is missing of {repo_id}")

    gigabytes = sum(sizes[name] for name in names) / 1e9
    print(f"Downloading {repo_id} ({gigabytes:.1f} GB) to {save_dir}...", flush=True)
    for name in missing:  # the library takes a truncated file with the old date for a complete one
        if (target / name).exists():
            (target / name).unlink()
    patterns = [glob.escape(name) for name in names]
    snapshot_download(repo_id, revision=info.sha, local_dir=target, token=token, allow_patterns=patterns)
    for name in missing:  # where the connection breaks off, the library may take the directory as it is
        if not _is_complete(target / name, sizes[name]):
            raise UserError(f"{target / name} is not complete: {AGAIN}")
    return info.sha


def choose_files(repo_id: str, on_hub) -> List[str]:
    """The names that are fetched, of those in the repository: the small files, and the weights once, as the last."""
    small = [name for name in on_hub if re.fullmatch(SMALL_FILES, name)]
    for kind in WEIGHTS:
        weights = [name for name in on_hub if re.fullmatch(kind, name)]
        if weights:
            return small + weights
    raise UserError(f"{repo_id} has no weights that transformers can load: choose another model")


def _refuse_other_files(repo_id: str, target: Path, expected: set) -> None:
    """UserError where a file of another model is there: from_pretrained would load a mixture of the two."""
    for path in sorted(target.glob("*")):
        if path.suffix in (".safetensors", ".bin", ".model", ".json") and path.name not in expected:
            raise UserError(
                f"{target} contains {path.name}, which is not a file of {repo_id} (of a --tiny or another model?): "
                "delete that directory or choose another --save-dir, and run again"
            )


def _is_complete(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _explain(error: Exception, repo_id: str, save_dir: str, token: Optional[str]) -> str:
    """What went wrong, and what to do. The hub hides from a token what it may not see."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import GatedRepoError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if disk_problem(error):
        problem = disk_problem(error)
        return f"cannot write {save_dir}: {problem}. Free disk space or choose another --save-dir, then {AGAIN}"
    if status == 401 and (token or get_token()):
        return (
            "the hub does not know the token (from --token, HF_TOKEN or an earlier login): "
            f"create one at {TOKENS_PAGE} and run again with --token <your token>"
        )
    if isinstance(error, GatedRepoError) or status == 403:
        return (
            f"{repo_id} is gated: accept its licence at https://huggingface.co/{repo_id} (it can take hours to be "
            f"granted), create a token at {TOKENS_PAGE} and run again with --token <your token>"
        )
    if status in (401, 404):
        return (
            f"{constants.ENDPOINT} has no model {repo_id}, or it is private: "
            "check --model-name, or give the --token of an account that may read it"
        )
    return (
        f"the download from {constants.ENDPOINT} failed ({first_line(error)[:300]}): check the network, then {AGAIN}; "
        "to rehearse without a network, use --tiny"
    )


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
    try:
        status = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=timeout).status_code
    except Exception:  # of the HTTP library, which changes by release
        return hub
    hub["reachable"] = status < 500
    if token:
        hub["token"] = {200: "accepted", 401: "refused"}.get(status, "not verified")
    return hub


# ------------------------------------------------------------------------------------------------ .bin to safetensors


def name_of_converted(name: str) -> str:
    """pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors"""
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def is_converted(path: Path, size: int) -> bool:
    """Whether the .bin file `path` of `size` bytes has been converted to a safetensors file, which is complete."""
    header = read_header(path.with_name(name_of_converted(path.name))) or {}
    return header.get("__metadata__", {}).get("made_of") == f"{path.name} ({size} bytes)"


def to_safetensors(directory: Path) -> None:
    """Convert the pytorch_model*.bin files of a directory to safetensors, one by one, and their index."""
    bins = sorted(directory.glob("pytorch_model*.bin"))
    index = directory / "pytorch_model.bin.index.json"
    if bins and index.is_file():
        (directory / INDEX).write_text(name_of_converted(index.read_text("utf-8")), encoding="utf-8")
    for path in bins:
        if not is_converted(path, path.stat().st_size):
            _convert(path)
        path.unlink()


def _convert(path: Path) -> None:
    from safetensors.torch import save_file

    size = path.stat().st_size
    target = path.with_name(name_of_converted(path.name))
    require_disk_space(size, path.parent, target.name)
    print(f"Converting {path.name} to {target.name}...", flush=True)
    weights = load_mapped(path)
    seen = set()
    for name, weight in weights.items():  # safetensors refuses two names of one tensor
        weights[name] = weight.clone() if weight.data_ptr() in seen else weight.contiguous()
        seen.add(weight.data_ptr())
    new = target.with_suffix(".part")
    save_file(weights, new, metadata={"format": "pt", "made_of": f"{path.name} ({size} bytes)"})
    new.chmod(path.stat().st_mode)  # safetensors makes its files readable by their owner only
    fsync(new)
    new.replace(target)
