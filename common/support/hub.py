"""A model from the Hugging Face hub into a directory: the hub client alone.

`download_model` streams files straight to disk: a 132 GB model needs 132 GB of disk and almost no memory, and the same
command run again fetches only what is missing: https://huggingface.co/docs/huggingface_hub/guides/download
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import signal
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from common.support.exit import STOP_SIGNALS, UserError, first_line
from common.support.files import atomic_write, require_disk_space, require_writable
from common.support.model_dir import check_weights, header_of, write_origin

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
AGAIN = "run the same command again (files that are complete are kept)"


def download_model(repo_id, save_dir, token=None, convert=False):
    """Download what transformers needs of the model `repo_id` ("owner/name") into the directory `save_dir`.

    token: an access token of the hub; without one the library looks for HF_TOKEN and for an earlier `hf auth login`.
    convert: turn weights that come as .bin files into safetensors.
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
        require_writable(target, "--save-dir")
        timeout = constants.HF_HUB_ETAG_TIMEOUT  # seconds; without one, an address that never answers would hang
        info = HfApi().model_info(repo_id, files_metadata=True, timeout=timeout, token=token)
        on_hub = {file.rfilename: file.size or 0 for file in info.siblings}  # name -> bytes
        names = choose_files(repo_id, on_hub)
        # Everyone may see the list of a gated model, but not its files: ask for one before anything is made on disk.
        get_hf_file_metadata(hf_hub_url(repo_id, names[-1], revision=info.sha), token=token, timeout=timeout)

    done = {name_of_converted(name) for name in names if is_converted(target / name, on_hub[name])}
    names = [name for name in names if name_of_converted(name) not in done]
    strangers = {path.name for path in target.glob("*") if path.suffix in (".safetensors", ".bin", ".model", ".json")}
    strangers -= {*on_hub, *done, *[INDEX] * bool(done)}
    if strangers:  # from_pretrained would mix the two, it takes a model.safetensors before the shards beside it
        raise UserError(
            f"{save_dir} holds {min(strangers)}, which is not of {repo_id} (of a --tiny stand-in or another model?): "
            "delete that directory or choose another --save-dir, and run again"
        )
    missing = [name for name in names if not _complete(target / name, on_hub[name])]
    bytes_missing = sum(on_hub[name] for name in missing) - _bytes_of_partial_files(target)
    require_disk_space(bytes_missing, save_dir, f"What is missing of {repo_id}")

    print(f"Downloading {repo_id} ({sum(on_hub[name] for name in names) / 1e9:.1f} GB) to {save_dir}...", flush=True)
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:  # else it is the reader's own wish
        enable_progress_bars()

    def stop(number, _):  # the library would first let all running transfers end, many GB
        _bytes_of_partial_files(target, age=0)
        _remove_if_empty(target, new_dirs)
        os.write(2, b"\nInterrupted: files that are complete are kept. Run the same command to go on.\n")
        os._exit(128 + number)

    others = [(number, signal.signal(number, stop)) for number in (signal.SIGINT, *STOP_SIGNALS)]
    try:
        with _one_line_errors(repo_id, save_dir, token):
            for name in missing:  # the library may take a file that was cut short but kept its date for the whole one
                (target / name).unlink(missing_ok=True)
            wanted = [glob.escape(name) for name in names]
            snapshot_download(repo_id, revision=info.sha, local_dir=target, token=token, allow_patterns=wanted)
    finally:
        for number, other in others:
            signal.signal(number, other)
        _remove_if_empty(target, new_dirs)
    # where the hub goes away in between, the library takes a directory as it is for the whole
    if missing := [name for name in missing if not _complete(target / name, on_hub[name])]:
        raise UserError(f"{target / missing[0]} has not come in full: {AGAIN}")
    if convert:
        to_safetensors(save_dir)
    check_weights(save_dir, hint="run the same command again")
    write_origin(target, repo_id, f"revision {info.sha}")
    print(f"Model saved in {save_dir}", flush=True)


def ask_hub(timeout: float) -> dict:
    """{"endpoint", "reachable", "token": "none", "accepted", "refused" or "not verified"}. The token is never shown."""
    try:
        from huggingface_hub import constants, get_token
        from huggingface_hub.utils import get_session  # the library's own connection: its proxies and certificates
    except ImportError:  # before the first pip install
        return {"endpoint": None, "reachable": False, "token": "none"}
    token = get_token()
    hub = {"endpoint": constants.ENDPOINT, "reachable": False, "token": "not verified" if token else "none"}

    def ask():
        headers = {"authorization": f"Bearer {token}"} if token and token.isascii() else {}  # else no header has it
        with suppress(Exception):  # of the HTTP library, which changes by release
            status = get_session().get(f"{hub['endpoint']}/api/whoami-v2", headers=headers, timeout=timeout).status_code
            hub["reachable"] = status < 500
            if token:
                hub["token"] = {200: "accepted", 401: "refused"}.get(status, "not verified")

    # in a thread, for the timeout does not cover a name server that never answers
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return dict(hub)


def _complete(path, size):
    return path.is_file() and path.stat().st_size == size


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
    reason = first_line(chain[-1])[:200]
    return (
        f"the download from {constants.ENDPOINT} failed ({reason}): check the network, then {AGAIN}; "
        "to rehearse without a network, use --tiny"
    )


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


def choose_files(repo_id, on_hub):
    """The names that `download_model` fetches, out of the repository's: the small files, and the weights once."""
    weights = next(filter(None, ([n for n in on_hub if re.fullmatch(kind, n)] for kind in WEIGHTS)), None)
    if not weights:
        raise UserError(f"{repo_id} has no weights that transformers reads as they are: choose another model")
    index = re.sub(r"[-_]\d+-of-\d+", "", weights[0]) + ".index.json"  # which tensor is in which shard
    small = [n for n in on_hub if re.fullmatch(SMALL_FILES, n) and (n == index or not n.endswith(".index.json"))]
    return small + weights


INDEX = "model.safetensors.index.json"


def name_of_converted(name: str) -> str:
    """pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors"""
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def is_converted(path: Path, size: int) -> bool:
    """Whether the safetensors file that was made of the .bin file `path` of `size` bytes is there, and whole."""
    facts = header_of(path.with_name(name_of_converted(path.name)), {}).get("__metadata__", {})
    return path.suffix == ".bin" and (facts.get("made_of"), facts.get("bytes")) == (path.name, str(size))


def to_safetensors(model_dir: str) -> None:
    """Turn the pytorch_model*.bin files of a directory into safetensors, with an index where they are several.

    Interrupted, it goes on with the file that it was at. UserError where one can't be read, or the disk has no room.
    """
    directory = Path(model_dir)
    for scratch in directory.glob(".model*.safetensors*.????????"):  # of a process that was killed
        shutil.rmtree(scratch, ignore_errors=True)
    for path in sorted(directory.glob("pytorch_model*.bin")):
        _convert(path)
    shards = sorted(directory.glob("model-*-of-*.safetensors"))
    if not shards or (directory / INDEX).is_file():
        return
    headers = {shard.name: header_of(shard, {}) for shard in shards}
    places = {name: shard for shard, header in headers.items() for name in header if name != "__metadata__"}
    size = sum(
        headers[shard][name]["data_offsets"][1] - headers[shard][name]["data_offsets"][0]
        for name, shard in places.items()
    )
    with atomic_write(directory / INDEX) as new:
        new.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2), encoding="utf-8")


def _convert(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    size, target = path.stat().st_size, path.with_name(name_of_converted(path.name))
    if not is_converted(path, size):
        require_disk_space(size, path.parent, target.name)
        print(f"Converting {path.name} to {target.name}...", flush=True)
        try:
            try:  # mapped, where torch can: the file is never in memory as a whole
                weights = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
            except (TypeError, RuntimeError):  # torch before 2.1, or a file in torch's form before 1.6
                weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # a damaged file fails in many ways, of many types
            raise UserError(f"{path} can't be read: delete it and run the same command again") from None
        places = set()
        for name, weight in weights.items():  # safetensors takes no two names of one tensor
            shared = weight.data_ptr() in places
            places.add(weight.data_ptr())
            weights[name] = weight.clone() if shared else weight.contiguous()
        with atomic_write(target) as new:
            save_file(weights, new, metadata={"format": "pt", "made_of": path.name, "bytes": str(size)})
            new.chmod(path.stat().st_mode)  # safetensors lets nobody else read its files
    path.unlink()
