"""Chat templates to choose by name, for base models and tokenizers that bring none.

Written for fsdpq after what the models' own pages document; every answer is between ``generation``
marks, with what ends it. Torch-free: the recipe's rules and ``fsdpq kinds`` list the names.
A tokenizer that begins its texts with a token gets it in front of the template's text.
https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

NO_TEMPLATE = "none"
"""Value of ``data.chat_template`` for the plain texts of the formats."""

TEMPLATE_FILE = ".jinja"
"""Ending of a value of ``data.chat_template`` that is a file."""


@dataclass(frozen=True)
class BuiltInTemplate:
    """A chat template of ours.

    Attributes:
        summary: for people, one line.
        tokens: marks that must be tokens of the tokenizer: the model would have to learn them as
            spelled texts otherwise, and generation could not stop at one.
        needs_eos: answers end in the tokenizer's end-of-text token.
        source: Jinja.
    """

    summary: str
    tokens: tuple[str, ...]
    needs_eos: bool
    source: str


_REFUSE_OTHERS = """{{ raise_exception('this template has no role ' ~ message['role']) }}"""

_SYSTEM_BEFORE_USER = """\
{% set told = namespace(text='') %}
{% for message in messages %}
{% if message['role'] == 'system' %}
{% if not loop.first %}{{ raise_exception('a system message must be the first') }}{% endif %}
{% set told.text = message['content'] ~ '\\n\\n' %}
"""
"""For models that know no system: its text goes before the first user's."""

_CHATML = (
    """\
{% for message in messages %}
{{ '<|im_start|>' ~ message['role'] ~ '\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] ~ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- elif message['role'] in ('system', 'user', 'tool') %}{{ message['content'] ~ '<|im_end|>\\n' }}
{%- else %}"""
    + _REFUSE_OTHERS
    + """{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
)

_LLAMA3 = (
    """\
{% for message in messages %}
{% set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}
{%- if role == 'assistant' %}
{% generation %}{{ message['content'] | trim ~ '<|eot_id|>' }}{% endgeneration %}
{% elif role in ('system', 'user', 'ipython') %}{{ message['content'] | trim ~ '<|eot_id|>' }}
{%- else %}"""
    + _REFUSE_OTHERS
    + """{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
)

_PHI3 = (
    """\
{% for message in messages %}
{{ '<|' ~ message['role'] ~ '|>\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] ~ '<|end|>' }}{% endgeneration %}{{ '\\n' }}
{%- elif message['role'] in ('system', 'user') %}{{ message['content'] ~ '<|end|>\\n' }}
{%- else %}"""
    + _REFUSE_OTHERS
    + """{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
"""
)

_ZEPHYR = (
    """\
{% for message in messages %}
{{ '<|' ~ message['role'] ~ '|>\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] ~ eos_token }}{% endgeneration %}{{ '\\n' }}
{%- elif message['role'] in ('system', 'user') %}{{ message['content'] ~ eos_token ~ '\\n' }}
{%- else %}"""
    + _REFUSE_OTHERS
    + """{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
"""
)

_GEMMA = (
    _SYSTEM_BEFORE_USER
    + """\
{% elif message['role'] == 'user' %}
{{ '<start_of_turn>user\\n' ~ (told.text ~ message['content']) | trim ~ '<end_of_turn>\\n' }}
{%- set told.text = '' %}
{% elif message['role'] == 'assistant' %}
{{ '<start_of_turn>model\\n' }}
{%- generation %}{{ message['content'] | trim ~ '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}"""
    + _REFUSE_OTHERS
    + """{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
)

_MISTRAL = (
    _SYSTEM_BEFORE_USER
    + """\
{% elif message['role'] == 'user' %}
{{ '[INST] ' ~ told.text ~ message['content'] ~ ' [/INST]' }}
{%- set told.text = '' %}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ ' ' ~ message['content'] | trim ~ eos_token }}{% endgeneration %}
{% else %}"""
    + _REFUSE_OTHERS
    + """{% endif %}
{% endfor %}
"""
)

_VICUNA = (
    """\
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}
{%- else %}{{ 'A chat between a curious user and an artificial intelligence assistant. ' }}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions." }}
{%- endif %}
{% for message in messages %}
{% if message['role'] == 'user' %}{{ ' USER: ' ~ message['content'] | trim }}
{%- elif message['role'] == 'assistant' %}{{ ' ASSISTANT:' }}
{%- generation %}{{ ' ' ~ message['content'] | trim ~ eos_token }}{% endgeneration %}
{% elif message['role'] != 'system' or not loop.first %}"""
    + _REFUSE_OTHERS
    + """{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}
"""
)

_ALPACA = (
    """\
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] ~ '\\n\\n' }}
{%- else %}{{ 'Below is an instruction that describes a task. ' }}
{{- 'Write a response that appropriately completes the request.\\n\\n' }}
{%- endif %}
{% for message in messages %}
{% if message['role'] == 'user' %}{{ '### Instruction:\\n' ~ message['content'] ~ '\\n\\n' }}
{%- elif message['role'] == 'assistant' %}{{ '### Response:\\n' }}
{%- generation %}{{ message['content'] ~ eos_token }}{% endgeneration %}{{ '\\n\\n' }}
{%- elif message['role'] != 'system' or not loop.first %}"""
    + _REFUSE_OTHERS
    + """{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}
"""
)

BUILT_IN_TEMPLATES: Mapping[str, BuiltInTemplate] = MappingProxyType(
    {
        "chatml": BuiltInTemplate(
            "`<|im_start|>user`: Qwen, SmolLM, Yi and others",
            ("<|im_start|>", "<|im_end|>"),
            False,
            _CHATML,
        ),
        "llama3": BuiltInTemplate(
            "`<|start_header_id|>user<|end_header_id|>`: Llama 3",
            ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            False,
            _LLAMA3,
        ),
        "gemma": BuiltInTemplate(
            "`<start_of_turn>user`: Gemma 1 to 3; a system's text goes before the first user's",
            ("<start_of_turn>", "<end_of_turn>"),
            False,
            _GEMMA,
        ),
        "phi3": BuiltInTemplate(
            "`<|user|>`, `<|end|>`: Phi-3",
            ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
            False,
            _PHI3,
        ),
        "mistral": BuiltInTemplate(
            "`[INST] ... [/INST]`: Mistral 7B; a system's text goes before the first user's",
            (),
            True,
            _MISTRAL,
        ),
        "zephyr": BuiltInTemplate(
            "`<|user|>` and the end-of-text token: any base model", (), True, _ZEPHYR
        ),
        "vicuna": BuiltInTemplate(
            "`USER: ... ASSISTANT: ...` and the end-of-text token: any base model",
            (),
            True,
            _VICUNA,
        ),
        "alpaca": BuiltInTemplate(
            "`### Instruction:`, `### Response:` in turns: any base model", (), True, _ALPACA
        ),
    }
)
"""Every built-in template by the name that ``data.chat_template`` gives it."""
