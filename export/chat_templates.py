"""The chat formats of Mistral's tokenizers as jinja templates, by the tokenizer's version."""

# Refused is what mistral-common would join or move: two turns of one role, a system message further on.
_TURNS = """\
{%- if tools -%}{{- raise_exception('tools are not supported') -}}{%- endif -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}{%- set turns = messages -%}
{%- endif -%}
{%- if system is not string -%}{{- raise_exception('the system prompt must be text') -}}{%- endif -%}
{%- if turns | length % 2 == 0 -%}
  {{- raise_exception('expected user and assistant in turn, the user first and last') -}}
{%- endif -%}
<s>
{%- for turn in turns -%}
  {%- if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('expected user and assistant in turn, found ' ~ turn['role']) -}}
  {%- elif turn['content'] is not string or turn['tool_calls'] -%}
    {{- raise_exception('expected text as content, and no tool calls') -}}
  {%- elif turn['role'] == 'user' -%}
    USER
  {%- elif turn['content'] == '' -%}
    {{- raise_exception('an answer must not be empty') -}}
  {%- else -%}
    ASSISTANT
  {%- endif -%}
{%- endfor -%}
"""


def _template(user: str, assistant: str) -> str:
    return _TURNS.replace("USER", user).replace("ASSISTANT", assistant)


# v1 has no token between [/INST] and the answer: the blank is the one that starts every SentencePiece text.
_TEMPLATE_V1 = _template(
    "{{- '[INST] ' ~ (system ~ '\\n\\n' if system and loop.first else '') ~ turn['content'] ~ ' [/INST]' -}}",
    "{{- ' ' ~ turn['content'] ~ '</s>' -}}",
)
_TEMPLATE_V2 = _template(
    "{{- '[INST]' ~ (system ~ '\\n\\n' if system and loop.last else '') ~ turn['content'] ~ '[/INST]' -}}",
    "{{- turn['content'].rstrip(' ') ~ '</s>' -}}",
)
CHAT_TEMPLATES = {1: _TEMPLATE_V1, 2: _TEMPLATE_V2, 3: _TEMPLATE_V2}
"""By version of mistral-common's tokenizers; v2 and v3 differ in tools only. Later ones are not made."""
