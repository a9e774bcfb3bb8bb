"""The model with its loss is one module: it can be made on the meta device, sharded, and saved while it trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed.fsdp
import transformers

from common.device import Device
from common.optim import make_optimizer
from common.support.model_dir import ModelSource
from common.tokenization import load_tokenizer
from model.load import load_model
from model.loss import CausalLMLoss
from model.save import save_model
from model.tiny import write_tiny
from tests.conftest import ROOT, TIMEOUT, environment
from tests.test_loss import a_split
from tests.test_training import options

CPU = Device(torch.device("cpu"), "test", torch.float32, False)

SHARDED = """
import json, os, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, {root!r})
from common.batches import Batches
from model.lora import add_lora
from model.load import load_model
from model.loss import CausalLMLoss
from tests.test_loss import a_split, with_lora

directory, lora, shard = sys.argv[1], sys.argv[2] == "lora", sys.argv[3] == "shard"
if shard:
    dist.init_process_group("gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if shard else (0, 1)
torch.manual_seed(0)
model = load_model(directory, torch.device("cpu"))
model = CausalLMLoss(with_lora(model) if lora else model)
if shard:
    layers = model.network.model.layers if hasattr(model.network, "model") else model.network.transformer.h
    for layer in layers:
        fully_shard(layer)
    if model.network.get_input_embeddings().weight is model.network.get_output_embeddings().weight:
        fully_shard([model.network.get_input_embeddings(), model.network.get_output_embeddings()])
    fully_shard(model)
optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
split = a_split(rows=12)
batches = Batches(split, 12, 10_000)
rows, found = list(range(12)), []  # of which each process takes its share
for step in range(3):
    (batch,) = batches.micro_batches(rows)
    loss = model(*batch)
    (loss * world / int(batches.label_counts.sum())).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    total = loss.detach().clone()
    if shard:
        dist.all_reduce(total)
    optimizer.step()
    optimizer.zero_grad()
    found.append([total.item(), norm.item()])
if rank == 0:
    print(json.dumps(found))
if shard:
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in ("llama3", "smollm2", "gpt"):
        write_tiny(kind, root / kind)
    return root


def sharded(directory, place, processes, lora=False):
    """[[loss, gradient norm] of three steps], by `processes` real processes; 0: one, without any sharding."""
    script = place / "sharded.py"
    script.write_text(SHARDED.format(root=str(ROOT)), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, str(script), str(directory), "lora" if lora else "full", "shard" if processes else "whole"]
    started = [
        subprocess.Popen(
            words,
            env=environment(
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(max(1, processes))
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(max(1, processes))
    ]
    answers = [process.communicate(timeout=TIMEOUT) for process in started]
    assert all(process.returncode == 0 for process in started), answers
    return json.loads(answers[0][0].splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(getattr(torch.distributed, "fsdp", None), "fully_shard"), reason="torch before 2.6 can't shard so"
)
@pytest.mark.parametrize(
    "kind, lora",
    [
        ("smollm2", False),  # its embeddings are its output layer
        ("llama3", False),
        ("llama3", True),
    ],
)
def test_two_processes_that_shard_it_train_as_one_does(kind, lora, directories, tmp_path):
    """PyTorch's own sharding, with the loss module as its root: the same losses and gradient norms."""
    whole = sharded(directories / kind, tmp_path, 0, lora)
    two = sharded(directories / kind, tmp_path, 2, lora)
    assert len(whole) == 3 and whole[0][0] != whole[2][0]
    for (loss, norm), (loss_of_two, norm_of_two) in zip(whole, two):
        assert loss_of_two == pytest.approx(loss, rel=1e-6) and norm_of_two == pytest.approx(norm, rel=1e-4)


@pytest.mark.skipif(not hasattr(torch.device, "__enter__"), reason="torch before 2.0 can't build on a device so")
@pytest.mark.parametrize("kind", ["llama3", "gpt", "smollm2", "mistral"])
def test_it_can_be_made_on_the_meta_device(kind):
    """Nothing is computed before there are weights; what the head does is asked at the first forward."""
    from model.configs import CONFIGS

    config = {key: value for key, value in CONFIGS[kind].items() if key not in ("architectures", "torch_dtype")}
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        module = CausalLMLoss(transformers.AutoModelForCausalLM.from_config(config))
    assert module.own_head is None and all(weight.is_meta for weight in module.parameters())


def test_saving_in_mid_training_changes_nothing_of_the_training(directories, tmp_path):
    """The weights stay float32 while copies in the stored type go to the disk, and the next step is the same."""
    directory = str(directories / "llama3")  # stored in bfloat16
    tokenizer, split = load_tokenizer(directory), a_split()

    def config_of(model):
        config = model.model.config.to_dict()
        config.pop("_attn_implementation_autoset", None)  # a note of transformers 4.50 to itself, which saving changes
        return config

    def train(save):
        model = CausalLMLoss(load_model(directory, torch.device("cpu")))
        optimizer = make_optimizer(model, options(tmp_path), CPU)
        from common.batches import Batches

        (batch,) = Batches(split, 12, 10_000).micro_batches(list(range(12)))
        for step in range(4):
            model(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if save and step in (0, 2):
                before = {name: weight.clone() for name, weight in model.state_dict().items()}
                config = config_of(model)
                save_model(model, tokenizer, str(tmp_path / "saved"), base=directory)
                assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
                assert config_of(model) == config
        return model.state_dict()

    plain, saved = train(False), train(True)
    assert all(weight.dtype == torch.float32 for weight in saved.values() if weight.is_floating_point())
    assert all(torch.equal(weight, saved[name]) for name, weight in plain.items())
    assert {entry["dtype"] for entry in ModelSource(tmp_path / "saved").tensors.values()} == {"BF16"}
    assert ModelSource(tmp_path / "saved").tensors.keys() == ModelSource(directory).tensors.keys()
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", torch_dtype="auto")
    assert reopened.dtype == torch.bfloat16
    assert os.stat(tmp_path / "saved" / "model.safetensors").st_mode & 0o044  # others may read it
