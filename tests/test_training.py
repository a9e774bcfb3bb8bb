"""The training loop: its schedule, its log, its clock, and what it says when the loss breaks."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import tempfile
from argparse import Namespace

import pytest
import torch

from common import train_log
from common.batches import Batches
from common.device import Device, start_device
from common.optim import learning_rate, make_optimizer
from common.support.exit import UserError
from common.trainer import train
from model.load import load_for_training, load_model
from model.loss import CausalLMLoss
from model.memory_plan import TrainingPlan
from model.save import save_model
from model.tiny import write_tiny
from tests.test_loss import a_split, padded, row_lengths

PLAN = TrainingPlan(200, False)
CPU = Device(torch.device("cpu"), "test", torch.float32, False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "smollm2-135m"
    write_tiny("smollm2", path)
    return str(path)


def options(tmp_path, **changed):
    values = {
        "batch_size": 4, "epochs": 1, "max_train_steps": 0, "micro_batch_tokens": 200, "train_on_prompt": False,
        "block_size": 64, "lr": 1e-3, "weight_decay": 0.01, "warmup_steps": 0, "lr_scheduler": "constant", "seed": 0,
        "max_grad_norm": 1.0, "log_interval": 1, "eval_step": 0, "eval_rows": 256, "save_dir": str(tmp_path / "out"),
        "bits": 0, "use_lora": False, "gradient_checkpointing": False, "model_name_or_path": "model",
        "dataset_name_or_path": "data", "save_steps": 0, "save_total_limit": 1, "restart": False, "keep_best": False,
        "skip_nonfinite": 0,
        "report_to": None,
    }  # fmt: skip
    return Namespace(**{**values, **changed})


def run(directory, tmp_path, device=CPU, kind=CausalLMLoss, **changed):
    """Train the stand-in on random rows; the model, the records of the log, what was printed, what `train` returned."""
    args = options(tmp_path, **changed)
    torch.manual_seed(args.seed)
    model = load_model(directory, device.torch_device, torch.float32)
    dataset = {
        "train": a_split(1, rows=30),
        "validation": a_split(2, rows=9),
        "meta": {"template": "alpaca"},
        "sha256": "",
    }
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module = kind(model, device.static_shapes)
        plan = TrainingPlan(args.micro_batch_tokens, False)
        facts = train(module, make_optimizer(module, args, device), dataset, args, plan, device)
    with open(tmp_path / "out" / "training_log.jsonl", encoding="utf-8") as file:
        return model, [json.loads(line) for line in file], printed.getvalue(), facts


def first_epoch():
    """The rows of the batches of the first epoch of `run`, by its own seed and batch size."""
    batches = Batches(a_split(1, rows=30), 4, 200)
    return batches, [batches.rows_for_step(step, 0) for step in range(1, 8)]


def test_log_lines_and_step_totals(directory, tmp_path):
    _, records, printed, facts = run(directory, tmp_path, epochs=3, log_interval=5, eval_step=10)
    # 30 rows in batches of 4: 7 steps an epoch, the short batch dropped
    steps = re.findall(
        r"^\[Step (\d+)/21\] \| Loss: \d+\.\d{5} \| Duration: \d+\.\d\d \| Throughput: \d+\.\d\d tokens/sec$",
        printed,
        re.MULTILINE,
    )
    assert steps == ["5", "10", "15", "20", "21"]
    assert re.findall(r"^\[Step (\d+)/21\] \| Held-out loss: \d+\.\d{5}$", printed, re.M) == ["0", "10", "20", "21"]
    assert [record["step"] for record in records if "loss" in record] == [5, 10, 15, 20, 21]
    memory = r"Memory: (\S+) GB used, peak (\S+) GB \((\d+)% of (\S+) GB\)"
    first, *_, last, done = printed.rstrip().splitlines()
    assert done == "Training Done"
    for line in (first, last):
        used, peak, share, total = map(float, re.fullmatch(memory, line).groups())
        assert 0.1 < used <= peak < total and share == pytest.approx(100 * peak / total, abs=0.6)
    assert facts["dataset"] == {"template": "alpaca"} and facts["options"]["epochs"] == 3
    assert "finished" not in facts and not (tmp_path / "out" / "run.json").exists()  # nothing is saved yet


def test_max_train_steps_takes_the_place_of_epochs(directory, tmp_path):
    for steps in (3, 16):
        _, records, *_ = run(directory, tmp_path, epochs=2, max_train_steps=steps)
        assert [record["step"] for record in records if "loss" in record][-1] == steps


def test_the_loss_falls_and_the_held_out_loss_is_that_of_transformers(directory, tmp_path):
    model, records, *_ = run(directory, tmp_path, epochs=6, eval_rows=5)
    losses = [record["loss"] for record in records if "loss" in record]
    assert sum(losses[-7:]) < 0.9 * sum(losses[:7])
    batch = padded(a_split(2, rows=9), list(range(5)), 64)
    model.eval()
    expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert abs(records[-1]["held_out_loss"] - expected.item()) < 1e-5


def test_same_seed_same_losses_to_the_last_bit(directory, tmp_path):
    first, second = (run(directory, tmp_path, epochs=2)[1] for _ in range(2))
    other = run(directory, tmp_path, epochs=2, seed=1)[1]
    losses = [[record.get("loss", record.get("held_out_loss")) for record in log] for log in (first, second, other)]
    assert losses[0] == losses[1] != losses[2]


def test_the_logged_loss_is_the_mean_over_the_label_tokens_since_the_last_line(directory, tmp_path):
    _, single, *_ = run(directory, tmp_path, epochs=1, lr=0.0)
    _, double, *_ = run(directory, tmp_path, epochs=1, lr=0.0, log_interval=7)
    batches, rows_of_steps = first_epoch()
    weights = [int(batches.label_counts[rows].sum()) for rows in rows_of_steps]
    losses = [record["loss"] for record in single if "loss" in record]
    mean = sum(loss * weight for loss, weight in zip(losses, weights)) / sum(weights)
    assert abs(next(record["loss"] for record in double if "loss" in record) - mean) < 1e-5


def test_learning_rate_schedules(directory, tmp_path):
    rates = {
        name: [learning_rate(step, 10, 3e-4, 2, name) for step in range(1, 11)]
        for name in ("constant", "linear", "cosine")
    }
    factors = {name: [rate / 3e-4 for rate in values] for name, values in rates.items()}
    for values in factors.values():
        assert values[:3] == [0.5, 1.0, 1.0]
    assert factors["constant"][2:] == [1.0] * 8
    assert factors["linear"][2:] == pytest.approx([1 - n / 8 for n in range(8)])
    assert factors["cosine"][6] == pytest.approx(0.5) and 0 < factors["cosine"][9] < factors["linear"][9]
    _, records, *_ = run(directory, tmp_path, max_train_steps=10, warmup_steps=2, lr_scheduler="linear", lr=0.5e-3)
    assert [record["lr"] for record in records if "lr" in record] == pytest.approx(
        [0.5e-3 * f for f in factors["linear"]]
    )


def test_gradients_are_clipped_to_the_norm(directory, tmp_path, monkeypatch):
    norms, limits = [], []
    clip = torch.nn.utils.clip_grad_norm_

    def recording(parameters, limit):
        parameters = list(parameters)
        norm = clip(parameters, limit)
        norms.append(math.sqrt(sum(float((weight.grad**2).sum()) for weight in parameters)))
        limits.append((float(norm), limit))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording)
    run(directory, tmp_path, max_grad_norm=0.01)
    assert len(norms) == 7 and all(norm <= 0.0101 for norm in norms)
    run(directory, tmp_path, max_grad_norm=0.0)  # measured, and not clipped
    assert norms[7:] == [pytest.approx(norm, rel=1e-4) for norm, _ in limits[7:]] and len(norms) == 14


def test_norms_and_biases_do_not_decay(directory, tmp_path):
    model = CausalLMLoss(load_model(directory, torch.device("cpu"), torch.float32))
    matrices, others = make_optimizer(model, options(tmp_path), CPU).param_groups
    assert matrices["weight_decay"] == 0.01 and all(weight.dim() == 2 for weight in matrices["params"])
    assert others["weight_decay"] == 0.0 and all(weight.dim() == 1 for weight in others["params"])
    assert len(matrices["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_on_moai_platform_its_own_tool_tells_the_memory():
    assert CPU._replace(static_shapes=True).memory_line() == "Memory: see moreh-smi"


def test_the_clock_is_read_after_the_device_has_finished(directory, tmp_path, monkeypatch):  # fault 9
    events = []

    class Recording(Device):
        def synchronize(self):
            events.append("finished")

    clock = train_log.perf_counter
    monkeypatch.setattr(train_log, "perf_counter", lambda: events.append("clock") or clock())
    # at the start; for each line: the device finishes, the line's time is read, the next starts; the same around the
    # held-out losses of the begin and of the end, for which the clock stands still
    for eval_rows, times in ((0, 7), (256, 9)):
        events.clear()
        run(directory, tmp_path, Recording(*CPU), eval_rows=eval_rows)
        assert events == ["clock"] + ["finished", "clock", "clock"] * times


def test_throughput_counts_no_padding(directory, tmp_path):
    _, records, *_ = run(directory, tmp_path, eval_rows=0, log_interval=7)
    (record,) = records
    tokens = sum(int(row_lengths(a_split(1, rows=30))[rows].sum()) for rows in first_epoch()[1])
    assert record["tokens_per_second"] * record["duration"] == pytest.approx(tokens, rel=1e-5)


def test_a_loss_that_is_no_number_ends_with_what_to_do(directory, tmp_path):
    with pytest.raises(UserError, match=r"The loss is (nan|inf) at step \d+\. Try a smaller --lr"):
        run(directory, tmp_path, epochs=30, lr=1e20, max_grad_norm=0.0)


class Strange(CausalLMLoss):
    """Its loss, or only its gradient, is no number at some micro-batches, by their numbers."""

    at, loss = (), math.nan

    def forward(self, **batch):
        loss = super().forward(**batch)
        if not torch.is_grad_enabled():
            return loss
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen not in self.at:
            return loss
        weight = next(self.parameters())
        return loss + self.loss if self.loss else loss + (weight - weight.detach()).abs().sqrt().sum()  # 0, d/dx inf


@pytest.mark.parametrize("loss, word", [(math.nan, "loss"), (math.inf, "loss"), (0.0, "gradient norm")])
def test_a_step_that_is_no_number_is_left_out_and_counted(loss, word, directory, tmp_path, monkeypatch):
    monkeypatch.setattr(Strange, "loss", loss)
    same = {"micro_batch_tokens": 10_000, "eval_rows": 0}  # a micro-batch a step
    before = []

    class Watched(Strange):
        def forward(self, **batch):
            before.append([weight.detach().clone() for weight in self.parameters()])
            return super().forward(**batch)

    monkeypatch.setattr(Strange, "at", (3, 5))
    _, records, printed, _ = run(directory, tmp_path, kind=Watched, skip_nonfinite=2, **same)
    assert f"[Step 3/7] | The {word} is" in printed
    assert [record["step"] for record in records if "skipped" in record] == [3, 5]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 4, 6, 7]
    assert all(math.isfinite(record["loss"]) for record in records if "loss" in record)
    for step in (3, 5):  # nothing of it has reached a weight
        assert all(map(torch.equal, before[step - 1], before[step]))
    assert not all(map(torch.equal, before[3], before[4]))
    with pytest.raises(UserError, match=f"The {word} is .* at step 5"):
        run(directory, tmp_path, kind=Strange, skip_nonfinite=1, **same)
    # Without the option it is found where a loss is logged: the gradient has made the weights NaN by then.
    with pytest.raises(UserError, match="The loss is .* at step " + ("4" if word == "gradient norm" else "3")):
        run(directory, tmp_path, kind=Strange, **same)


def test_a_broken_training_leaves_the_good_checkpoint(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(Strange, "at", (4,))
    with pytest.raises(UserError, match=r"The loss is nan at step 4.*--restart \(.*checkpoint-3 is from before it\)"):
        run(directory, tmp_path, kind=Strange, micro_batch_tokens=10_000, eval_rows=0, save_steps=1)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_held_out_loss_that_is_no_number_is_never_the_best(directory, tmp_path):
    class StrangeAfterTheFirstStep(Strange):
        def forward(self, **batch):
            loss = super().forward(**batch)
            return loss if torch.is_grad_enabled() or self.seen != 1 else loss * math.nan

        seen = 0

    same = {"micro_batch_tokens": 10_000, "keep_best": True, "eval_step": 1, "max_train_steps": 3}
    _, records, printed, facts = run(directory, tmp_path, kind=StrangeAfterTheFirstStep, **same)
    assert "[Step 1/3] | Held-out loss: nan" in printed
    held_out = [record["held_out_loss"] for record in records if "held_out_loss" in record]
    assert len(held_out) == 4 and math.isnan(held_out[1])
    assert facts["held_out_loss"]["after"] == records[-1]["best_held_out_loss"] == min(held_out[2:])


def test_static_shapes_are_static_for_the_short_last_batch_too(directory, tmp_path):
    shapes = set()

    class Recording(CausalLMLoss):
        def forward(self, **batch):
            shapes.update(tensor.shape for tensor in batch.values() if tensor is not None)
            return super().forward(**batch)

    _, static, *_ = run(directory, tmp_path, CPU._replace(static_shapes=True), kind=Recording)
    assert shapes == {torch.Size([4, 64])}
    _, dynamic, *_ = run(directory, tmp_path)
    assert static[-1]["held_out_loss"] == pytest.approx(dynamic[-1]["held_out_loss"], abs=1e-4)


def test_saved_model_has_the_trained_weights_in_the_stored_type(tmp_path):
    from transformers import AutoModelForCausalLM

    from common.tokenization import load_tokenizer

    for kind, stored in (("llama3", torch.bfloat16), ("smollm2", torch.float32)):
        source, target = tmp_path / kind, tmp_path / f"{kind}-out"
        write_tiny(kind, source)
        model = load_model(str(source), torch.device("cpu"), torch.float32)
        assert next(model.parameters()).dtype == torch.float32
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.01)
        expected = {name: weight.to(stored) for name, weight in model.state_dict().items()}
        target.mkdir()
        (target / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier, larger model")
        save_model(model, load_tokenizer(str(source)), str(target), base=str(source), run={"command": ["x"]})
        loaded = AutoModelForCausalLM.from_pretrained(target, torch_dtype="auto")
        assert {name: torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items()} == {
            name: True for name in expected
        }
        assert next(loaded.parameters()).dtype == stored
        assert [file.name for file in target.glob("*.safetensors")] == ["model.safetensors"]
        assert loaded.generation_config.eos_token_id == load_tokenizer(str(target)).eos_token_id
        run_json = json.loads((target / "run.json").read_text(encoding="utf-8"))
        assert run_json.pop("finished")[:3] == "202" and run_json == {"command": ["x"]}
        assert not list(target.glob(".*")) and not list(tmp_path.glob(".*"))
        # with the loss it is the same, and without a base the weights stay as they are
        save_model(CausalLMLoss(model), load_tokenizer(str(source)), str(tmp_path / "again"))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", torch_dtype="auto").state_dict()
        assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())
        assert not (tmp_path / "again" / "run.json").exists()


def test_the_trained_model_reaches_another_disk(directory, tmp_path):
    from common.tokenization import load_tokenizer

    with tempfile.TemporaryDirectory(dir="/dev/shm") as disk:
        (tmp_path / "out").symlink_to(disk, target_is_directory=True)
        assert os.stat(disk).st_dev != os.stat(tmp_path).st_dev
        model = load_model(directory, torch.device("cpu"), torch.float32)
        save_model(model, load_tokenizer(directory), str(tmp_path / "out"))
        assert os.path.getsize(f"{disk}/model.safetensors") > 100_000
        assert not list(tmp_path.glob(".*"))


def test_a_disk_too_small_for_the_result_is_said_before_the_training(directory, tmp_path, monkeypatch):
    """And before the model is loaded: the files tell how large it is."""
    args = options(tmp_path, model_name_or_path=directory, save_dir=str(tmp_path / "new" / "out"))
    size = os.path.getsize(f"{directory}/model.safetensors")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    assert isinstance(load_for_training(args, PLAN, CPU), CausalLMLoss)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    monkeypatch.setattr("model.load.load_model", None)
    line = rf"^The trained model takes {size / 1e9:.1f} GB in {args.save_dir}, and that disk has \d+\.\d GB free\. "
    with pytest.raises(UserError, match=line + r"Free disk space or choose another --save-dir\.$"):
        load_for_training(args, PLAN, CPU)
    assert not (tmp_path / "new").exists()


def test_half_precision_leaves_the_buffers_alone(directory):
    from transformers import AutoModelForCausalLM

    ours = load_model(directory, torch.device("cpu"), torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.bfloat16)
    frequencies = {name: buffer for name, buffer in theirs.named_buffers() if name.endswith("inv_freq")}
    for name, buffer in frequencies.items():
        assert torch.equal(dict(ours.named_buffers())[name], buffer) and buffer.dtype == torch.float32
    assert frequencies
    assert {weight.dtype for weight in ours.parameters()} == {torch.bfloat16}
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight


def test_weights_that_are_missing_are_named(directory, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(directory, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del weights[name]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lack {name}"):
        load_model(str(tmp_path / "model"), torch.device("cpu"), torch.float32)


def test_the_accelerator_is_seeded_and_told(capsys):
    device = start_device(11)
    first = torch.rand(3)
    start_device(11)
    assert torch.equal(first, torch.rand(3))
    assert capsys.readouterr().out.startswith(f"Device: {device.name}, ")
    assert device.gradient_scaler().is_enabled() == (device.dtype == torch.float16)
