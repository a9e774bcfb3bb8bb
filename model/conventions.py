"""What the real tokenizers have that a reader depends on: classes, special tokens and their order, chat templates."""

from __future__ import annotations

# tokenizer_config.json with the class that the hub's names, because a class has habits of its own (the padding side).
SENTENCEPIECE = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                 "add_bos_token": True, "add_eos_token": False, "legacy": False}  # fmt: skip
LLAMA3 = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>",
          "eos_token": "<|end_of_text|>", "clean_up_tokenization_spaces": True}  # fmt: skip
# ChatML in the form of Qwen3-Instruct-2507's: no default system text, no thinking, results of tools as the user's
CHATML = (
    "{%- for message in messages %}{%- set tool = message.role == 'tool' %}"
    "{{- '<|im_start|>' + ('user' if tool else message.role) + '\n' }}"
    "{{- '<tool_response>\n' + message.content + '\n</tool_response>' if tool else message.content }}"
    "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# as SmolLM2-Instruct's, with a system text where a conversation brings none
SMOLLM2_CHATML = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}{%- endif %}" + CHATML
)
TOKENIZERS = {
    "llama2": SENTENCEPIECE,
    "mistral": SENTENCEPIECE,
    "llama3": LLAMA3,
    "llama3_1": LLAMA3,
    "gpt": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>", "add_prefix_space": False},
    "smollm2": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
                "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>", "chat_template": SMOLLM2_CHATML},
    "qwen3": {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>", "unk_token": None, "add_prefix_space": False, "add_bos_token": False,
              "chat_template": CHATML},
}  # fmt: skip

# The special tokens in the order of their ids: before the others in SmolLM2 (and SentencePiece), behind them elsewhere.
RESERVED = [f"<|reserved_special_token_{number}|>" for number in range(5)]
HEADER = ["<|start_header_id|>", "<|end_header_id|>"]
SPECIALS = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:4], *HEADER, RESERVED[4], "<|eot_id|>"],
    "llama3_1": ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:2], "<|finetune_right_pad_id|>", RESERVED[2],
                 *HEADER, "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"],
    "gpt": ["<|endoftext|>"],
    "smollm2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}  # fmt: skip
NOT_SPECIAL = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]  # Qwen3's
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
