"""common/support/hub.py against a hub on 127.0.0.1: the real client library, real HTTP, real files."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile

import pytest

from common.support.exit import UserError
from common.support.model_dir import check_weights
from tests.conftest import ROOT, TIMEOUT
from tests.hub_server import HubServer

PROGRAM = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
    "from common.support.exit import run; from common.support.hub import download_model; "
    "run(lambda: download_model(*sys.argv[1:]))"
)
TOKEN, OTHER = "hf_of_an_account_with_the_licence", "hf_of_an_account_without"
REPO, GATED = "org/model", "org/gated"


def safetensors(**sizes):
    """A valid safetensors file with one tensor of so many bytes for each name."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + os.urandom(end)


def torch_bin(size=2000):
    """A file as torch.save writes it since torch 1.6, without torch."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
        archive.writestr("archive/data/0", os.urandom(size))
    return buffer.getvalue()


def index(**shard_of_tensor):
    return json.dumps({"metadata": {}, "weight_map": shard_of_tensor}).encode()


SHARDS = {
    "model-00001-of-00002.safetensors": safetensors(a=3000, b=10),
    "model-00002-of-00002.safetensors": safetensors(c=2000),
    "model.safetensors.index.json": index(
        a="model-00001-of-00002.safetensors", b="model-00001-of-00002.safetensors", c="model-00002-of-00002.safetensors"
    ),
}
BINS = {
    "pytorch_model-00001-of-00002.bin": torch_bin(),
    "pytorch_model-00002-of-00002.bin": torch_bin(),
    "pytorch_model.bin.index.json": index(a="pytorch_model-00001-of-00002.bin", b="pytorch_model-00002-of-00002.bin"),
}
SMALL = {
    name: name.encode() * 9
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    + ("vocab[1].txt", "merges.txt", "chat_template.jinja", "modeling_own.py", "README.md", "USE_POLICY.md", "LICENSE")
}
TWINS = {
    name: b"x" * 50_000
    for name in ("consolidated.safetensors", "consolidated.00.pth", "model.pt", "flax_model.msgpack", "tf_model.h5")
    + ("model.onnx", "model.Q4_0.gguf", "rust_model.ot", "training_args.bin")
    + ("original/consolidated.00.pth", "original/params.json", "original/tokenizer.model", "onnx/model.safetensors")
    + ("vocab1.txt.bak", ".gitattributes")
}
MODEL = dict(SMALL, **SHARDS)


def environment(hub, home, **env):
    """The variables for a program that is to ask `hub` (a HubServer or an address), without the tester's own."""
    kept = {k: v for k, v in os.environ.items() if not re.match("HF_|HUGGING", k) and not k.lower().endswith("_proxy")}
    return dict(kept, HF_ENDPOINT=getattr(hub, "url", hub), HF_HOME=str(home), **env)


@pytest.fixture
def download(tmp_path):
    """A function that runs `download_model` as a script would, in a process of its own (Popen: and does not wait)."""

    def run(hub, repo, save_dir, token=None, before=(), start=subprocess.run, **env):
        args = [repo, str(save_dir)] + ([token] if token else [])
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "universal_newlines": True}
        options.update({"timeout": TIMEOUT} if start is subprocess.run else {})
        env = environment(hub, tmp_path / "hf_home", **env)
        return start([*before, sys.executable, "-c", PROGRAM, *args], env=env, cwd=str(tmp_path), **options)

    return run


def files_in(directory):
    """The files of a model directory, without the library's records."""
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return {str(path) for path in paths if path.parts[0][0] != "."}


def error_of(run, clean=True):
    """The reader's one line. clean: nothing else may be on the screen (no progress bar has started yet)."""
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, run.stderr
    if clean:
        assert run.stderr == lines[0] + "\n"
        assert run.stdout == ""
    return lines[0]


# ------------------------------------------------------------------------------------------- which files, from where


def test_the_safetensors_and_the_small_files_come_once(download, tmp_path):
    with HubServer({REPO: dict(TWINS, **BINS, **MODEL)}, gated={REPO: TOKEN}) as hub:
        run = download(hub, REPO, "./dir", TOKEN)
        assert run.returncode == 0, run.stderr
        assert run.stdout == f"Downloading {REPO} (0.0 GB) to ./dir...\nModel saved in ./dir\n"
        assert "Fetching " in run.stderr  # the library's progress bar
        assert hub.downloaded() == files_in(tmp_path / "dir") == {*MODEL, "pytorch_model.bin.index.json"}
        assert all((tmp_path / "dir" / name).read_bytes() == data for name, data in MODEL.items())
        assert all(hub.served(name) == len(data) for name, data in MODEL.items())
        on_cdn = [request for request in hub.requests if request.path.startswith("/cdn/")]
        assert on_cdn and not any(request.token for request in on_cdn)  # the token stays with the hub

        hub.requests.clear()  # a second run
        run = download(hub, REPO, "./dir", TOKEN, HF_HUB_DISABLE_PROGRESS_BARS="1")
        assert run.returncode == 0 and run.stdout.endswith("Model saved in ./dir\n")
        assert run.stderr == ""
        assert hub.downloaded() == set()


def test_pytorch_weights_where_there_are_no_others(download, tmp_path):
    with HubServer({REPO: dict(TWINS, **SMALL, **BINS)}) as hub:
        run = download(hub, REPO, tmp_path / "a" / "b")
        assert run.returncode == 0, run.stderr
        assert hub.downloaded() == files_in(tmp_path / "a" / "b") == set(SMALL) | set(BINS)


def test_one_file_of_weights_goes_before_its_own_shards(download, tmp_path):
    single = {"config.json": b"{}", "model.safetensors": safetensors(a=10)}
    with HubServer({REPO: dict(SHARDS, **single)}) as hub:
        assert download(hub, REPO, "dir").returncode == 0
        assert hub.downloaded() - {"model.safetensors.index.json"} == set(single)


@pytest.mark.parametrize("source", ["--token", "HF_TOKEN", "login"])
def test_each_way_to_give_a_token(download, tmp_path, source):
    (tmp_path / "hf_home").mkdir()
    (tmp_path / "hf_home" / "token").write_text((TOKEN if source == "login" else "hf_old") + "\n")
    env = {"--token": {"HF_TOKEN": "hf_old"}, "HF_TOKEN": {"HF_TOKEN": TOKEN}, "login": {}}[source]
    with HubServer({GATED: MODEL}, gated={GATED: TOKEN}) as hub:
        run = download(hub, GATED, "dir", f" {TOKEN}\n" if source == "--token" else None, **env)
        assert run.returncode == 0, run.stderr
        assert files_in(tmp_path / "dir") == set(MODEL)


# ------------------------------------------------------------------------------------------------ refusals of the hub

PAGE, TOKENS_PAGE = f"https://huggingface.co/{GATED}", "https://huggingface.co/settings/tokens"
REFUSALS = {
    "no token": (GATED, None, {}, [f"{GATED} is gated", PAGE, TOKENS_PAGE, "--token"]),
    "no token, hidden list": (GATED, None, {"gated_list": True}, [f"{GATED} is gated", PAGE, "--token"]),
    "invalid token": (REPO, "hf_wrong", {}, ["does not know the token", TOKENS_PAGE, "--token"]),
    "licence not accepted": (GATED, OTHER, {}, [f"{GATED} is gated", "accept its licence", PAGE]),
    "no such model": ("org/modle", None, {}, ["no model org/modle", "private", "--model-name"]),
    "not a name": ("./llama 2", None, {}, ["./llama 2"]),
    "not a token": (GATED, "<사용자 토큰>", {}, ["--token is not an access token", TOKENS_PAGE]),
    "no weights": ("org/gguf", None, {}, ["org/gguf has no weights", "choose another model"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_one_line_and_leaves_nothing(download, tmp_path, case):
    repo, token, options, words = REFUSALS[case]
    repos = {GATED: MODEL, REPO: MODEL, "org/gguf": {"config.json": b"{}", "model.gguf": b"x"}}
    with HubServer(repos, gated={GATED: TOKEN}, tokens=[OTHER], **options) as hub:
        error = error_of(download(hub, repo, "new/dir", token))
        assert all(word in error for word in words), error
        assert token is None or token not in error
        assert hub.downloaded() == set()
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("case", ["refused", "silent", "ill"])
def test_a_hub_that_cannot_be_reached(download, tmp_path, case):
    with socket.socket() as listener, HubServer({REPO: MODEL}) as hub:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"  # bound, not listening: refused
        if case == "silent":
            listener.listen()  # takes connections and never answers
        elif case == "ill":
            url, hub.failing = hub.url, {"/api/": 503}
        error = error_of(download(url, REPO, "dir", HF_HUB_ETAG_TIMEOUT="1"))
    why = {"refused": "refused", "silent": "timed out", "ill": "503"}[case]
    assert why in error and url in error and "run the same command again" in error and "--tiny" in error
    assert not (tmp_path / "dir").exists()


# ---------------------------------------------------------------------------------------------------------- the disk


def test_too_little_disk_is_said_before_anything_comes(download, tmp_path):
    with HubServer({REPO: MODEL}, sizes={REPO: {"model-00001-of-00002.safetensors": 10**17}}) as hub:
        error = error_of(download(hub, REPO, "new/dir"))
        free = shutil.disk_usage(tmp_path).free / 1e9
        needs, has = (float(number) for number in re.findall(r"([\d.]+) GB", error))
        assert needs == 10**8 and abs(has - free) < 5, error
        assert "new/dir" in error and "--save-dir" in error
        assert hub.downloaded() == set() and not (tmp_path / "new").exists()


def small_disk(directory, size):
    """The beginning of a command that runs with a disk of its own mounted on `directory`. The mount ends with it."""
    directory.mkdir()
    script = f'mount -t tmpfs -o size={size} none {directory} && exec "$@"'
    before = ["unshare", "-rm", "sh", "-c", script, "sh"]
    if not shutil.which("unshare") or subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    return before


def test_a_disk_that_fills_up_in_the_middle(download, tmp_path):
    repo = {"config.json": b"{}", "model.safetensors": safetensors(a=30_000_000)}
    with HubServer({REPO: repo}, sizes={REPO: {"model.safetensors": 1000}}) as hub:
        run = download(hub, REPO, "disk/dir", before=small_disk(tmp_path / "disk", "2m"))
        error = error_of(run, clean=False)
        assert "cannot write disk/dir: No space left on device" in error and "run the same command again" in error


def test_complete_files_need_no_disk_a_second_time(download, tmp_path):
    before = small_disk(tmp_path / "disk", "5m")
    repo = {"config.json": b"{}", "model.safetensors": safetensors(a=3_000_000)}
    with HubServer({REPO: repo}) as hub:
        twice = ["sh", "-c", '"$@" && "$@" && df -k --output=avail disk', "sh"]
        run = download(hub, REPO, "disk/dir", before=before + twice)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("Model saved in disk/dir") == 2
        assert int(run.stdout.split()[-1]) * 1024 < 3_000_000  # it could not have come once more


# ----------------------------------------------------------------------------------------- what broke off, and going on


def test_a_transfer_that_breaks_off_is_resumed(download, tmp_path):
    """The library resumes in the same run or, before 1.0, in the next one; either way only the rest comes again."""
    weights = safetensors(a=25_000_000)  # the library writes in pieces of 10 MB
    with HubServer({REPO: {"config.json": b"{}", "model.safetensors": weights}}) as hub:
        hub.cuts = {"model.safetensors": [12_000_000]}
        run = download(hub, REPO, "dir")
        if run.returncode:
            error = error_of(run, clean=False)
            assert hub.url in error and "run the same command again" in error and "--tiny" in error
            run = download(hub, REPO, "dir")
        assert run.returncode == 0, run.stderr
        ranges = [request.range for request in hub.requests if request.method == "GET" and request.range]
        assert len(ranges) == 1 and int(re.match(r"bytes=(\d+)-", ranges[0]).group(1)) >= 10_000_000
        assert hub.served("model.safetensors") <= 12_000_000 + len(weights) - 10_000_000
        assert (tmp_path / "dir" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_connection_that_keeps_breaking(download, tmp_path):
    with HubServer({REPO: MODEL}) as hub:
        second = "model-00002-of-00002.safetensors"
        hub.cuts = {second: [1000] * 20}
        error = error_of(download(hub, REPO, "dir"), clean=False)
        assert f"from {hub.url} failed" in error and "run the same command again" in error
        assert files_in(tmp_path / "dir") == set(MODEL) - {second}

        hub.cuts.clear()
        hub.requests.clear()
        assert download(hub, REPO, "dir").returncode == 0
        assert hub.downloaded() == {second}


def test_a_hub_that_goes_away_in_between(download, tmp_path):
    """Most releases then take a directory that is not empty for the whole model, with a warning and no error."""
    (tmp_path / "dir").mkdir()
    for name in set(MODEL) - {"tokenizer.json"}:
        (tmp_path / "dir" / name).write_bytes(MODEL[name])
    with HubServer({REPO: MODEL}) as hub:
        hub.failing = {"/revision/|/tree/": 410}
        run = download(hub, REPO, "dir")
        assert "run the same command again" in error_of(run, clean=False)
        assert "Model saved" not in run.stdout


@pytest.mark.parametrize(
    "first, number",
    [("config.json", signal.SIGINT), ("model.safetensors", signal.SIGINT), ("model.safetensors", signal.SIGTERM)],
)
def test_ctrl_c_or_sigterm_stops_at_once(download, tmp_path, first, number):
    """The library alone would go on until every running transfer is through."""
    with HubServer({REPO: {"config.json": b"{}" * 99, "model.safetensors": safetensors(a=25_000_000)}}) as hub:
        hub.stalls = {"config.json", "model.safetensors"} - {first}
        run = download(hub, REPO, "new/dir", start=subprocess.Popen, HF_HUB_DOWNLOAD_TIMEOUT="1800")
        deadline = time.monotonic() + TIMEOUT
        while (
            not (hub.stalled.is_set() and (tmp_path / "new" / "dir" / first).exists()) and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        run.send_signal(number)
        asked = time.monotonic()
        out, err = run.communicate(timeout=TIMEOUT)
        assert time.monotonic() - asked < 300
        assert run.returncode == 128 + number and "Traceback" not in err
        assert err.splitlines()[-1] == "Interrupted. Run the same command again to continue."
        assert files_in(tmp_path / "new" / "dir") == {first}


def test_a_file_cut_short_on_the_disk_comes_again(download, tmp_path):
    with HubServer({REPO: MODEL}) as hub:
        assert download(hub, REPO, "dir").returncode == 0
        shard = tmp_path / "dir" / "model-00001-of-00002.safetensors"
        before = shard.stat()
        with shard.open("r+b") as file:
            file.truncate(500)
        os.utime(str(shard), ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copying tool leaves it
        hub.requests.clear()
        assert download(hub, REPO, "dir").returncode == 0
        assert shard.read_bytes() == MODEL[shard.name]
        assert hub.downloaded() == {shard.name}


def test_the_directory_of_another_model_is_refused(download, tmp_path):
    (tmp_path / "dir").mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):  # the last one is the hub's as well
        (tmp_path / "dir" / name).write_bytes(b"tiny")
    with HubServer({REPO: dict(MODEL, **{"pytorch_model.bin": b"x"})}) as hub:
        error = error_of(download(hub, REPO, "dir"))
        assert "dir contains model.safetensors" in error and "--tiny" in error and "--save-dir" in error
        assert (tmp_path / "dir" / "config.json").read_bytes() == b"tiny"
        (tmp_path / "dir" / "model.safetensors").unlink()
        assert download(hub, REPO, "dir").returncode == 0
        check_weights(tmp_path / "dir")


# -------------------------------------------------------------------------------------------------- check_weights


@pytest.fixture
def model_dir(tmp_path):
    for name, data in dict(SHARDS, **{"config.json": b"{}"}).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def amiss(model_dir, name, *words):
    with pytest.raises(UserError) as caught:
        check_weights(model_dir, hint="run python tutorial/download_x.py again")
    line = str(caught.value)
    assert str(model_dir / name) in line and all(word in line for word in words), line
    assert line.endswith("run python tutorial/download_x.py again") and "\n" not in line


def test_whole_weights_pass(model_dir):
    check_weights(model_dir)
    check_weights(str(model_dir))
    (model_dir / "model.safetensors.index.json").unlink()
    (model_dir / "model.safetensors").write_bytes(safetensors())  # a file without any tensor is a valid one
    check_weights(model_dir)


def test_missing_config_and_weights(model_dir, tmp_path):
    amiss(model_dir / "nowhere", "", "no config.json")
    (model_dir / "model.safetensors.index.json").unlink()
    amiss(model_dir, "", "no weights")
    (model_dir / "config.json").unlink()
    amiss(model_dir, "", "no config.json")


def test_a_missing_shard(model_dir):
    (model_dir / "model-00002-of-00002.safetensors").unlink()
    amiss(model_dir, "model-00002-of-00002.safetensors", "is missing")


@pytest.mark.parametrize("change", [-1, -2500, -3100, 1])
def test_a_shard_of_the_wrong_length(model_dir, change):
    path = model_dir / "model-00001-of-00002.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size + change)
    amiss(model_dir, path.name, "truncated or damaged", "delete it")


HEADERS = [b"not json ", b"[1, 2]", b'{"a": 1}', b'{"a": {"data_offsets": []}}', b'{"a": {}}', b"\xff"]


@pytest.mark.parametrize(
    "data",
    [b"", b"abc", b"version https://git-lfs.github.com/spec/v1\n" + b"x" * 300]
    + [len(header).to_bytes(8, "little") + header for header in HEADERS],
)
def test_a_shard_that_is_something_else(model_dir, data):
    (model_dir / "model-00001-of-00002.safetensors").write_bytes(data)
    amiss(model_dir, "model-00001-of-00002.safetensors", "truncated or damaged")


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": ', b"\xff"])
def test_a_garbage_index(model_dir, text):
    (model_dir / "model.safetensors.index.json").write_bytes(text)
    amiss(model_dir, "model.safetensors.index.json", "is damaged")


def test_pytorch_shards(tmp_path):
    for name, data in dict(BINS, **{"config.json": b"{}"}).items():
        (tmp_path / name).write_bytes(data)
    check_weights(tmp_path)
    path = tmp_path / "pytorch_model-00002-of-00002.bin"
    for data in (BINS[path.name][:-30], b""):
        path.write_bytes(data)
        amiss(tmp_path, path.name, "truncated or damaged")
    path.unlink()
    amiss(tmp_path, path.name, "is missing")


def test_what_torch_and_safetensors_write(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    (tmp_path / "config.json").write_text("{}")
    tensors = {"a": torch.ones(7, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}
    for zipped in (True, False):
        torch.save(tensors, str(tmp_path / "pytorch_model.bin"), _use_new_zipfile_serialization=zipped)
        check_weights(tmp_path)
    save_file(tensors, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    check_weights(tmp_path)
