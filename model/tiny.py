"""A tiny model of about 1 MB for each tutorial: with it, every command runs on a laptop, offline, in seconds.

`write_tiny("llama3", "./llama3-8b")` writes what the download would: the same architecture class, files and tokenizer
conventions (which tokens begin and end a text, whether there is a pad token, which text has id 0), with random weights
and a tokenizer trained on the rows in dataset/samples. So mistakes show as they would with the real model: padding
Llama3 with id 0 hides every `!`.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

from common.support.exit import UserError
from common.support.files import atomic_write, require_writable
from common.support.hub import download_model
from model.configs import CONFIGS
from model.conventions import LLAMA3_WORDS, NOT_SPECIAL, SENTENCEPIECE, SPECIALS, TOKENIZERS

SAMPLES = Path(__file__).resolve().parents[1] / "dataset" / "samples"
VOCABULARY = 1600  # tokens at most, without the special tokens of Llama3 and GPT
REAL_WEIGHTS = 50 * 2**20  # bytes; no tiny model has a file of this size

# The sizes that replace those in the real model's config.json; all other settings stay. Their names are those on the
# hub, which every transformers reads. Version 5 saves new ones (`rope_parameters`), which older versions ignore. The
# dtype is the real one too: a script that forgets to ask for float32 gets bfloat16 here as well.
SMALL = {
    "hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "n_embd": 64, "n_inner": 256, "n_layer": 2, "n_head": 4,
}  # fmt: skip


def download_or_tiny(args, kind: str) -> None:
    """Download the model that `args` name, or with --tiny write the tiny model of this `kind`."""
    if args.tiny:
        write_tiny(kind, args.save_dir)
        print(f"Tiny model saved in {args.save_dir}")
    else:
        download_model(args.model_name, args.save_dir, args.token, convert=kind == "gpt")


def write_tiny(kind: str, save_dir, seed: int = 0) -> None:
    """Write the tiny model of `kind`, a key of CONFIGS, to `save_dir`.

    The same seed and samples give the same files. In a directory that exists, files of these names are replaced and all
    others stay. UserError if it contains a real model.
    """
    settings = {key: SMALL.get(key, value) for key, value in CONFIGS[kind].items()}
    if CONFIGS[kind].get("num_key_value_heads") == CONFIGS[kind].get("num_attention_heads", 0):
        settings["num_key_value_heads"] = SMALL["num_attention_heads"]  # Llama2 13B shares none
    target = Path(save_dir).resolve()
    _refuse_real_model(target)
    require_writable(target, "--save-dir")
    with atomic_write(target, stale=("tokenizer.model",)) as folder:
        folder.mkdir()
        tokenizer = _sentencepiece(folder) if TOKENIZERS[kind] is SENTENCEPIECE else _byte_level(kind)
        _save_tokenizer(tokenizer, TOKENIZERS[kind], folder)
        settings["vocab_size"] = tokenizer.get_vocab_size()
        names = [name for name in ("bos_token", "eos_token", "pad_token") if TOKENIZERS[kind].get(name)]
        settings.update({f"{name}_id": tokenizer.token_to_id(TOKENIZERS[kind][name]) for name in names})
        _save_model(settings, folder, seed)


def _refuse_real_model(target):
    for file in target.rglob("*"):  # a download that is under way has *.incomplete files in .cache
        weights = file.suffix in (".safetensors", ".bin", ".pth", ".gguf", ".incomplete") and file.is_file()
        if weights and file.stat().st_size > REAL_WEIGHTS:
            raise UserError(
                f"{target} contains a real model ({file.name}, {file.stat().st_size / 1e9:.2f} GB), which --tiny would "
                "overwrite. Choose another --save-dir, or delete that directory first."
            )


def _texts():
    """Every text of every sample row, in an order that is the same on every machine."""
    files = sorted(SAMPLES.glob("*/train.jsonl"))
    rows = [json.loads(line) for file in files for line in file.open(encoding="utf-8") if line.strip()]
    if not rows:
        raise UserError(f"{SAMPLES}/*/train.jsonl have no rows to train a tokenizer on. Clone the repository again.")
    return [value for row in rows for value in row.values() if isinstance(value, str)]


def _sentencepiece(folder):
    """Train tokenizer.model with Llama2's settings, and return the equivalent tokenizer for tokenizer.json."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    model = io.BytesIO()
    # character_coverage: the rarest characters become bytes, as most Hangul does in Llama2.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in _texts() for line in text.splitlines()), model_writer=model,
        model_type="bpe", vocab_size=VOCABULARY, hard_vocab_limit=False, byte_fallback=True, character_coverage=0.99,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, max_sentence_length=2**20, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    # SentencePiece joins the two neighbours that make the piece with the lowest id. So the merges are all ways to cut a
    # piece in two, in the order of the pieces. <unk>, <s>, </s> and the 256 bytes are not made of others.
    normal = {piece: index for piece, index in vocabulary.items() if index >= 3 + 256}
    merges = []
    for piece in normal:
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        halves = [(left, right) for left, right in halves if left in normal and right in normal]
        merges += sorted(halves, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = _begin_with(tokenizer, "<s>")
    return tokenizer


def _byte_level(kind):
    """Train the byte-level BPE of Llama3, GPT-2, SmolLM2 or Qwen3. Its bytes begin with `!`, id 0 but in SmolLM2."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    llama3 = kind.startswith("llama3")
    qwen3 = kind == "qwen3"
    specials = SPECIALS[kind]
    tokenizer = Tokenizer(models.BPE(ignore_merges=llama3))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not (llama3 or qwen3))
    if qwen3:
        tokenizer.normalizer = normalizers.NFC()
    if llama3 or qwen3:  # in Qwen3 each digit is a token
        pattern = LLAMA3_WORDS.replace("{1,3}", "") if qwen3 else LLAMA3_WORDS
        words = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, tokenizer.pre_tokenizer])
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=specials if kind == "smollm2" else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in NOT_SPECIAL if qwen3])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if llama3:
        begin = _begin_with(tokenizer, specials[0])
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, begin])
    return tokenizer


def _begin_with(tokenizer, bos):
    from tokenizers import processors

    ids = [(bos, tokenizer.token_to_id(bos))]
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=ids)


def _save_tokenizer(tokenizer, settings, folder):
    content = json.loads(tokenizer.to_str())
    model, added = content["model"], content["added_tokens"]
    # Each merge as one text, as in the hub's files: tokenizers before 0.20 cannot read pairs.
    model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if settings["tokenizer_class"] == "GPT2Tokenizer":  # its special token is in the vocabulary, too
        model["vocab"].update({token["content"]: token["id"] for token in added})
    specials = {token["id"]: {key: value for key, value in token.items() if key != "id"} for token in added}
    settings = {**settings, "added_tokens_decoder": specials, "model_input_names": ["input_ids", "attention_mask"]}
    _save_json(content, folder / "tokenizer.json")
    settings.setdefault("clean_up_tokenization_spaces", False)
    _save_json(settings, folder / "tokenizer_config.json")


def _save_model(settings, folder, seed):
    import torch
    import transformers

    # From a file, because transformers would change the dict. Without the dtype, because every torch can draw random
    # numbers in float32.
    _save_json({key: value for key, value in settings.items() if key != "torch_dtype"}, folder / "config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:  # the rope_scaling of Llama 3.1 in transformers 4.42 or older, Qwen3 in 4.50
        least = "4.51" if settings["model_type"] == "qwen3" else "4.43"
        raise UserError(
            f"transformers {transformers.__version__} is too old for this model. Run: pip install -U "
            f"'transformers>={least}'"
        ) from error
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random numbers unchanged
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.to(getattr(torch, settings["torch_dtype"])).save_pretrained(folder)
    # Both files again, without the version of the library.
    _save_json(settings, folder / "config.json")
    _save_json({k: v for k, v in settings.items() if k.endswith("_token_id")}, folder / "generation_config.json")


def _save_json(content, path):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
