"""The loss, and the gradients, are those of transformers for the one padded batch, however the batch is split."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
import transformers

from common.batches import IGNORE_INDEX, Batches, MicroBatch
from common.device import Device
from common.trainer import train
from model import loss as loss_file
from model.lora import add_lora
from model.loss import CausalLMLoss, has_plain_head
from model.memory_plan import TrainingPlan
from model.packing import SHORT_ROW, packed_attention
from model.tiny import write_tiny
from tests.helpers import answer_start, first_fast, split_of

SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}  # fmt: skip
# no tutorial uses these: Qwen2 has a plain head, Gemma2 caps its logits, Cohere and Granite scale them
OTHERS = {
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "cohere": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
}
PLAIN = ["llama2", "llama3", "mistral", "gpt", "qwen2"]
# an old transformers lacks some of them
KINDS = [*PLAIN, *(kind for kind in ("gemma2", "cohere", "granite") if hasattr(transformers, f"{kind.title()}Config"))]
LORA = [f"{kind} with LoRA" for kind in KINDS if kind in ("llama2", "gpt", "gemma2")]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    def build(name):
        torch.manual_seed(1)
        kind = name.split()[0]
        if kind in OTHERS:
            model = transformers.AutoModelForCausalLM.from_config(OTHERS[kind]())
        else:
            if not (root / kind).exists():
                write_tiny(kind, root / kind)
            model = transformers.AutoModelForCausalLM.from_pretrained(root / kind)
        with torch.no_grad():  # larger logits, so that a cap or a scale would be missed by a lot
            model.get_output_embeddings().weight.mul_(10)
        return with_lora(model.float()) if name in LORA else model.float()

    return build


def with_lora(model):
    """`model` with an adapter that has learned something: a new one's B is zero, and so is all that it adds."""
    model = add_lora(model, model.name_or_path, r=4, alpha=8, dropout=0.0, target_modules=["all-linear"])
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1, generator=generator)
    return model


def a_split(seed=0, rows=12, vocabulary=300):
    """Random rows of 2 to 60 tokens, their answers begin anywhere in them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 60, (rows,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(0, vocabulary, (int(offsets[-1]),), generator=generator, dtype=torch.int32)
    starts = (torch.rand(rows, generator=generator) * (lengths - 1)).int()
    return split_of(ids, offsets, starts)


def micro_batches(split, rows, tokens, train_on_prompt=False, packed=False):
    return Batches(split, len(rows), tokens, train_on_prompt=train_on_prompt, packed=packed).micro_batches(rows)


def padded(split, rows, length, train_on_prompt=False):
    """All rows in one batch, as transformers itself would be given them."""
    (batch,) = Batches(split, len(rows), 0, length, train_on_prompt).micro_batches(rows)
    return batch


def label_tokens(split, train_on_prompt=False):
    return int(Batches(split, 1, 0, train_on_prompt=train_on_prompt).label_counts.sum())


def row_lengths(split):
    return split["offsets"].diff()


def one_padded_batch(model, split, train_on_prompt):
    """The loss that transformers itself gives for all rows in one batch, with its gradients in the model."""
    batch = padded(split, list(range(12)), 64, train_on_prompt)
    loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    model.zero_grad()
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


@pytest.mark.parametrize("train_on_prompt", first_fast(1, [False, True]))
@pytest.mark.parametrize("kind", KINDS + LORA)
def test_loss_and_gradients_are_those_of_one_padded_batch(kind, train_on_prompt, build, monkeypatch):
    monkeypatch.setattr(loss_file, "CHUNK_ELEMENTS_ON_CPU", 300 * 7)  # several chunks in every micro-batch
    model, split = build(kind), a_split()
    model.eval()
    expected, gradients = one_padded_batch(model, split, train_on_prompt)
    module = CausalLMLoss(model)
    assert module.own_head is None  # asked at the first forward
    # of an adapter: its own weights, and no other
    assert {name for name, gradient in gradients.items() if gradient is not None} == {
        name for name in gradients if kind not in LORA or "lora_" in name
    }
    labels = label_tokens(split, train_on_prompt)
    cases = [(tokens, False) for tokens in (1, 64, 200, 10_000)]
    if hasattr(transformers, "AttentionMaskInterface"):
        packs = module.enable_packing(60)
        assert packs == ("gemma2" not in kind)  # whose attention caps as well
        cases += [(tokens, True) for tokens in (1, 64, 200, 10_000) if packs]
    for micro_batch_tokens, packed in cases:
        model.zero_grad()
        total = 0
        for micro_batch in micro_batches(split, list(range(12)), micro_batch_tokens, train_on_prompt, packed):
            loss = module(*micro_batch) / labels
            loss.backward()
            total += loss.detach()
        assert abs(total - expected) < 1e-5
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight.grad, gradients[name], atol=1e-5, rtol=1e-4)
    assert module.own_head == (kind.split()[0] not in PLAIN)


@pytest.mark.parametrize("kind", ["llama2", "llama2 with LoRA"])
@pytest.mark.parametrize("static_shapes", first_fast(1, [False, True]))
def test_a_training_step_is_that_of_one_padded_batch(static_shapes, kind, build, tmp_path):
    split = a_split()
    model = build(kind)
    _, gradients = one_padded_batch(model, split, False)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    device = Device(torch.device("cpu"), "test", torch.float32, static_shapes)
    for tokens in (60, 200, 10_000):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(before[name])
        args = Namespace(gradient_checkpointing=False, use_lora=False, bits=0,
                         batch_size=12, epochs=1, max_train_steps=1, micro_batch_tokens=tokens, train_on_prompt=False,
                         block_size=64, warmup_steps=0, lr_scheduler="constant", max_grad_norm=0.0, log_interval=1,
                         eval_step=0, eval_rows=0, seed=0, lr=1.0, save_dir=str(tmp_path), save_steps=0,
                         keep_best=False, save_total_limit=1, restart=True, skip_nonfinite=0, report_to=None,
                         model_name_or_path="model")  # fmt: skip
        # with a learning rate of 1, the change of a weight is its gradient
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
        dataset = {"train": split, "validation": split, "meta": {}, "sha256": ""}
        train(CausalLMLoss(model, static_shapes), optimizer, dataset, args, TrainingPlan(tokens, False), device)
        for name, weight in model.named_parameters():
            if gradients[name] is None:
                assert torch.equal(before[name], weight)
            else:
                torch.testing.assert_close(before[name] - weight.detach(), gradients[name], atol=1e-5, rtol=1e-4)


def test_a_cap_is_seen_even_where_the_logits_are_tiny(build):
    torch.manual_seed(0)
    if "gemma2" in KINDS:
        model = transformers.AutoModelForCausalLM.from_config(transformers.Gemma2Config(**SMALL))  # caps at 30
        assert model(torch.tensor([[5, 6, 7]])).logits.abs().max() < 1
        assert not has_plain_head(model)
    model = build("gpt").train()
    assert has_plain_head(model) and model.training


def test_logits_exist_only_a_chunk_at_a_time_and_only_where_there_is_a_label(build, monkeypatch):
    monkeypatch.setattr(loss_file, "CHUNK_ELEMENTS_ON_CPU", 300 * 7)
    products, mm = [], torch.mm

    def recording(inputs, weight, **to):
        if weight.shape[1] == 300:  # the vocabulary: the output layer
            products.append(len(inputs))
        return mm(inputs, weight, **to)

    model, split = build("qwen2"), a_split()
    module = CausalLMLoss(model)
    (batch,) = micro_batches(split, list(range(12)), 10_000)
    module(*batch)  # the first forward asks what the output layer does
    monkeypatch.setattr(torch, "mm", recording)
    module(*batch).backward()
    assert max(products) == 7 and sum(products) == label_tokens(split)


def test_an_evaluation_makes_no_gradients(build, monkeypatch):
    made, zeros_like = [], torch.zeros_like
    monkeypatch.setattr(loss_file.torch, "zeros_like", lambda *a, **of: made.append(a) or zeros_like(*a, **of))
    module = CausalLMLoss(build("llama3"))
    (batch,) = micro_batches(a_split(), list(range(12)), 10_000)
    with torch.no_grad():
        without = module(*batch)
    assert not made
    assert torch.equal(module(*batch), without) and made


@pytest.mark.skipif(not hasattr(torch, "compiler"), reason="torch before 2.1")
def test_no_operation_of_a_micro_batch_waits_for_a_value():
    """A fake tensor has no values: an operation that asks for one, and would make a GPU wait, raises."""
    from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

    (batch,) = micro_batches(a_split(), list(range(12)), 10_000)
    with FakeTensorMode() as fake:
        module = CausalLMLoss(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)))
        module.own_head = False  # asked once in a training
        batch = MicroBatch(*(part if part is None else fake.from_tensor(part) for part in batch))
        module(*batch).backward()
        assert all(weight.grad is not None for weight in module.parameters())
        with pytest.raises(DynamicOutputShapeException):
            batch.labels[batch.labels != IGNORE_INDEX]


def test_bfloat16_products_come_close(build):
    model, split = build("llama3").eval(), a_split()
    expected, _ = one_padded_batch(model, split, False)
    device = Device(torch.device("cpu"), "test", torch.bfloat16, False)
    module, labels = CausalLMLoss(model), label_tokens(split)
    model.zero_grad()
    with device.autocast():
        loss = sum(module(*batch) for batch in micro_batches(split, list(range(12)), 200)) / labels
    loss.backward()
    assert abs(loss - expected) < 0.02 * expected
    # all have one: the first forward, which asks what the head does without gradients, must cost the batch none
    gradients = [weight.grad for weight in model.parameters()]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)


def test_prompt_has_no_loss_by_default_and_every_answer_token_has():  # fault 4
    split = a_split(rows=40)
    for row in range(40):
        (batch,) = micro_batches(split, [row], 1000)
        start, length = answer_start(split, row), int(row_lengths(split)[row])
        assert (batch.labels[0, :start] == IGNORE_INDEX).all()
        assert torch.equal(batch.labels[0, start:], batch.input_ids[0, start:])  # fault 2: whatever their ids
        (batch,) = micro_batches(split, [row], 1000, True)
        assert torch.equal(batch.labels, batch.input_ids) and batch.labels.shape == (1, length)


def test_id_zero_is_trained_on_and_attended_to():  # fault 2: `!` has id 0 in Llama3 and GPT
    split = a_split(rows=12)
    split["input_ids"].zero_()
    batch = padded(split, list(range(12)), 64, train_on_prompt=True)
    assert torch.equal(batch.attention_mask.sum(1), row_lengths(split))
    assert torch.equal((batch.labels == 0).sum(1), row_lengths(split))


def test_micro_batches_hold_every_row_once_within_the_limit_and_with_little_padding():  # fault 5
    split = a_split(seed=3, rows=500)
    rows = list(range(500))
    batches = micro_batches(split, rows, 512)
    assert all(batch.input_ids.numel() <= 512 for batch in batches)
    assert sum(len(batch.input_ids) for batch in batches) == 500
    tokens, padded = int(row_lengths(split).sum()), sum(batch.input_ids.numel() for batch in batches)
    assert padded < 1.05 * tokens
    found = sorted(tuple(ids[labels != IGNORE_INDEX].tolist()) for b in batches for ids, labels in zip(b[0], b[1]))
    wanted = []
    for row in rows:
        begin, end = split["offsets"][row : row + 2].tolist()
        wanted.append(tuple(split["input_ids"][begin + answer_start(split, row) : end].tolist()))
    assert found == sorted(wanted)


def test_packed_micro_batches_hold_every_row_once_within_the_limit_and_without_padding():
    split = a_split(seed=3, rows=500)
    found, tokens = [], int(row_lengths(split).sum())
    for ids, labels, _, cu_seq_lens, positions in micro_batches(split, list(range(500)), 512, packed=True):
        assert ids.shape == labels.shape == (1, cu_seq_lens[-1]) and ids.numel() <= 512
        assert torch.equal(positions + 1, (labels[0] != IGNORE_INDEX).nonzero()[:, 0])
        lengths = cu_seq_lens.diff().tolist()
        found += zip(ids[0].split(lengths), labels[0].split(lengths))
    assert sum(len(ids) for ids, _ in found) == tokens
    wanted = []
    for row in range(500):
        begin, end = split["offsets"][row : row + 2].tolist()
        ids = split["input_ids"][begin:end].tolist()
        start = max(1, answer_start(split, row))  # what stands before a row's first token is another row's last one
        wanted.append((ids, [IGNORE_INDEX] * start + ids[start:]))
    assert sorted((ids.tolist(), labels.tolist()) for ids, labels in found) == sorted(wanted)
    assert len(micro_batches(split, list(range(500)), 512, packed=True)) == -(-tokens // 512)
    (batch,) = micro_batches(split, [7], 5, packed=True)  # longer than the limit: alone
    assert batch.cu_seq_lens.tolist() == [0, int(row_lengths(split)[7])] and batch.input_ids.numel() > 5


@pytest.mark.skipif(not hasattr(transformers, "AttentionMaskInterface"), reason="transformers before 4.53")
@pytest.mark.parametrize("length, dtype", [(SHORT_ROW - 1, torch.float32), (SHORT_ROW, torch.bfloat16)])
def test_short_packed_rows_attend_in_float32(length, dtype):
    """Though autocast would do it in bfloat16, which takes a CPU up to three times as long."""
    query, key, value = torch.randn((3, 1, 2, 2 * length, 8), generator=torch.Generator().manual_seed(0)).bfloat16()
    begins = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    module = Namespace(is_causal=True, num_key_value_groups=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = packed_attention(module, query, key, value, None, cu_seq_lens_q=begins)
    rows = [
        [part[:, :, half].to(dtype) for part in (query, key, value)] for half in (slice(length), slice(length, None))
    ]
    expected = [F.scaled_dot_product_attention(*row, is_causal=True).transpose(1, 2) for row in rows]
    assert torch.equal(output, torch.cat(expected, dim=1).bfloat16())


@pytest.mark.skipif(not hasattr(transformers, "AttentionMaskInterface"), reason="transformers before 4.53")
def test_rows_are_packed_only_where_the_model_calculates_each_alone(build):
    """A window shorter than the rows, or a state that goes on from row to row: padded, and as the model was.

    A new model's weights are so small that its state hardly shows in the logits.
    """
    small = {**SMALL, "sliding_window": 50}
    with_images = {"vision_config": {**SMALL, "image_size": 28, "patch_size": 14}, "text_config": small}
    mamba = {"mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 16}
    jamba = {"num_experts": 2, "attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False}
    for config, longest, packs in [
        (transformers.MistralConfig(**small), 50, True),
        (transformers.MistralConfig(**small), 51, False),
        (transformers.Gemma3Config(**with_images), 50, True),
        (transformers.Gemma3Config(**with_images), 51, False),
        (transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]), 51, False),
        (transformers.FalconH1Config(**SMALL, **mamba), 51, False),
        (transformers.JambaConfig(**SMALL, **mamba, **jamba), 51, False),
        (transformers.MambaConfig(vocab_size=300, hidden_size=32, state_size=8, num_hidden_layers=2), 51, False),
        (transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4), 51, False),  # its own attention
    ]:
        model = transformers.AutoModelForCausalLM.from_config(config).train()
        before = model(input_ids=torch.arange(20)[None]).logits.detach() if longest == 51 else None
        attention = model.config._attn_implementation
        assert CausalLMLoss(model).enable_packing(longest) == packs and model.training
        assert model.config._attn_implementation == ("packed" if packs else attention)
        assert packs or torch.equal(model(input_ids=torch.arange(20)[None]).logits, before)
    model = build("llama2").eval()
    padded = {"input_ids": torch.arange(40).view(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.int64)}
    padded["attention_mask"][0, :7] = 0  # on the left, as for an answer
    before = model(**padded).logits
    assert CausalLMLoss(model).enable_packing(64)
    assert torch.equal(model(**padded).logits, before)  # a mask is a mask as ever
    assert "packed" not in model.config.to_json_string()  # which is saved with it


@pytest.mark.parametrize("static_shapes", [False, True])
def test_a_training_on_a_cpu_packs(static_shapes, build, tmp_path, monkeypatch):
    asked = []
    forward = CausalLMLoss.forward
    monkeypatch.setattr(CausalLMLoss, "forward", lambda self, **given: asked.append(given) or forward(self, **given))
    test_a_training_step_is_that_of_one_padded_batch(static_shapes, "llama2", build, tmp_path)
    packed = not static_shapes and hasattr(transformers, "AttentionMaskInterface")
    assert asked and all((given["cu_seq_lens"] is not None) == packed for given in asked)


def test_epochs_are_shuffled_by_seed_and_drop_the_short_batch():
    split = a_split(rows=103)
    batches = Batches(split, 10, 512)

    def epoch(number, seed=5, batches=batches):
        return [batches.rows_for_step(step, seed) for step in range(10 * number + 1, 10 * number + 11)]

    assert batches.steps_per_epoch == 10
    first = epoch(0)
    assert [len(rows) for rows in first] == [10] * 10 and len(set(sum(first, []))) == 100
    assert first == epoch(0)
    assert first != epoch(0, seed=6)
    assert first != epoch(1)
    # every step's rows are known by itself: a training can go on anywhere
    assert Batches(split, 10, 512).rows_for_step(17, 5) == epoch(1)[6]
    assert Batches(split, 500, 512).batch_size == 103 and Batches(split, 500, 512).steps_per_epoch == 1
