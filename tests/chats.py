"""Chat templates in the shape of those that models come with, and a tokenizer that has their tokens."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import make_model

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n<|eot_id|>' }}"
    "{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
QWEN3 = (
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' and loop.last %}{%- set thought, said = '', m.content %}"
    "{%- if '</think>' in said %}{%- set thought = said.split('</think>')[0] %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}"
)
CHANNELS = (
    "{%- macro about() %}{{- 'Current date: ' + strftime_now('%Y-%m-%d') }}{%- endmacro %}"
    "{{- '<|start|>system<|message|>' + about() + '<|end|>' }}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)
OPEN_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
NEW_THOUGHT = (
    "{{ bos_token }}{%- for m in messages %}"
    "{{- '<start_of_turn>' + m.role + '\n' + m.content | trim + '<end_of_turn>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>assistant\n' }}"
    "{%- if not enable_thinking %}{{- '<|channel|>thought\n<|channel|>' }}{%- endif %}{%- endif %}"
)
"""Only before a new answer does it write an empty thought."""
LAST_SYSTEM = (
    "{{ bos_token }}{%- for m in messages if m.role != 'system' %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' }}"
    "{%- if loop.last and messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
    "{{- m.content + '[/INST]' }}{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
"""The system's text stands in the last user's message, while that is the last."""
NEXT_TURN = (
    "{%- for m in messages %}{{- '<|start|>' if m.role == 'user' else '<|message|>' }}"
    "{%- if m.role == 'assistant' %}{{- '\n<think></think>\n' }}{%- endif %}{{- m.content | trim }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|message|>' }}"
    "{%- if not enable_thinking %}{{- '\n<think></think>' }}{%- endif %}{%- endif %}"
)
"""Nothing ends an answer but the mark of the next turn."""
SILENT = "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% endfor %}"
TEMPLATES = {
    "chatml": CHATML,
    "gemma": GEMMA,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "gpt-oss": CHANNELS,
}
ENDS = {
    **{"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>", "qwen3": "<|im_end|>"},
    **{"mistral": "</s>", "gpt-oss": "<|return|>"},
}
_TOKENS = [
    *["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>"],
    *["<|start_header_id|>", "<|end_header_id|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"],
]
_LINES = ["the film is good", "a bad story assistant user system", "positive negative red green blue final"]


def chat_tokenizer(template: str | None) -> Any:
    """A byte-level BPE that puts a BOS before every text, as many do; a chat template writes its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=_TOKENS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    loaded = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    loaded.chat_template = template
    return loaded


def make_chat_model(folder: Path, template: str | None, family: str = "llama", **changes: Any) -> Path:
    """A tiny model with a chat template; it has a token for every byte."""
    tokenizer = chat_tokenizer(template)
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    make_model(folder, family, **{**sizes, **changes})
    tokenizer.save_pretrained(folder)
    return folder
