"""Templates render as in transformers; one that would run for ever, or fill the memory, is stopped."""

import re
import threading
import time
import tracemalloc
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mistral_trt.errors import GenerationError
from mistral_trt.runtime.text import sandbox, template_meter
from mistral_trt.runtime.text.sandbox import Sandbox
from mistral_trt.runtime.text.template_instrumentation import Instrumentation
from mistral_trt.runtime.text.template_meter import LimitError
from mistral_trt.runtime.text.tokenizer import Tokenizer
from tests.models import write_tokenizer

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief.\n  <b>"},
    {"role": "user", "content": ' Hello "you"! '},
    {
        "role": "assistant",
        "content": "Hi, 漢 & 🙂",
        "calls": [{"name": "f", "arguments": {"x": [1, 2.5, None]}}],
    },
    {"role": "user", "content": ""},
]


def render(source: str, **variables: Any) -> str:
    return Sandbox(source).render({"messages": MESSAGES, **variables}, characters=100, now=datetime.now())


# ---------------------------------------------------------------- as transformers

SNIPPETS = [
    "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
    "{{ m.role }}{% endfor %}",
    "{% for m in messages if m['role'] != 'system' %}{{ loop.index0 }}"
    "{{ m['content'] }}\n{% else %}x{% endfor %}",
    "{% for m in messages if m.nothing %}x{% else %}none{% endfor %}",
    "{% for m in messages[1:] %}{{ loop.previtem.role if loop.previtem }}{{ loop.cycle('a', 'b') }}"
    "{% endfor %}",
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% break %}"
    "{% endfor %}",
    "{% for x in [[1, [2, [3]]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}",
    "{% for m in messages %}{% if loop.changed(m.role == 'user') %}|{% endif %}{% endfor %}",
    "{% for k, v in messages[2].items() %}{{ k }}={{ v }};{% endfor %}{{ messages[2].keys() | list }}",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a + ns.b }}{{ ns.c is defined }}",
    "{% set x %}a{{ messages | length }}b{% endset %}{{ x | upper }}{% set y | trim %}  c {% endset %}"
    "{{ y }}",
    "{% macro turn(m, end='!') %}[{{ m.role }}]{{ end }}{{ caller() if caller }}{% endmacro %}"
    "{{ turn(messages[0]) }}{{ turn(messages[1], end='?') }}{% call turn(messages[2]) %}inner{% endcall %}",
    "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(5) }}",
    "{% filter upper %}a{{ messages[0].role }}{% endfilter %}{% with a = 1 %}{{ a }}{% endwith %}",
    "{% generation %}{{ messages[2].content }}{% endgeneration %}{% raw %}{{ x }}{% endraw %}{# none #}",
    "{{ messages | tojson }}{{ messages[2] | tojson(indent=2) }}"
    "{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=True) }}",
    "{{ [1, 2] | tojson(separators=(',', ':')) }}{{ 'é' | tojson(ensure_ascii=True) }}",
    "{{ messages | map(attribute='role') | join(', ') }}"
    "{{ messages | map(attribute='role') | unique | list }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages | rejectattr('calls') | first }}",
    "{{ (messages | last).role }}{{ messages[-1].role }}{{ messages[::2] | length }}"
    "{{ messages[0].content[:2] }}",
    "{{ messages[1].content.strip() }}|{{ messages[1].content | trim }}|"
    "{{ ' a b '.split() }}|{{ 'a-b'.split('-')[-1] }}",
    "{{ 'a' ~ 1 ~ none ~ 2.5 }}{{ 'ab' * 3 }}{{ 3 * [0] }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}"
    "{{ 7 / 2 }}{{ -(1 + 2) }}",
    "{{ '%s and %05.1f' % ('a', 2) }}{{ '{}-{x:>4}'.format(1, x=2) }}{{ '%d' | format(3) }}",
    "{{ 'a,b'.replace(',', ';') }}{{ 'aXbX' | replace('X', 'yy', 1) }}{{ ['a', 'b'] | join }}"
    "{{ ','.join(['a', 'b']) }}",
    "{{ 'user' in messages[1].role }}{{ 'x' not in ['x', 'y'] }}{{ 1 < 2 <= 2 }}"
    "{{ messages[0] == messages[0] }}",
    "{{ messages[9] is undefined }}{{ none is none }}{{ 'a' is string }}{{ messages is iterable }}"
    "{{ 4 is even }}",
    "{{ 3 is odd }}{{ 9 is divisibleby(3) }}{{ messages[0] is mapping }}{{ [] is sequence }}"
    "{{ 'a' is in 'abc' }}",
    "{{ messages[0].missing | default('d') }}{{ '' | default('e', true) }}"
    "{{ messages[0].get('missing', 'g') }}",
    "{{ range(3) | list }}{{ range(10, 0, -3) | sum }}{{ [3, 1, 2] | sort }}{{ [3, 1] | max }}"
    "{{ 'ab' | list }}",
    "{{ [1, 2, 3, 4, 5] | batch(2) | list }}{{ [1, 2, 3] | slice(2) | list }}{{ [3, 4] | reverse | list }}",
    "{{ 'a\nb' | indent(2) }}{{ 'a b' | title }}{{ 'abc' | center(9) }}{{ 'a b c' | wordcount }}"
    "{{ 2.567 | round(1) }}",
    "{{ '3' | int + 1 }}{{ '2.5' | float }}{{ 5 | string + '!' }}{{ 'x' if messages else 'y' }}"
    "{{ not messages }}",
    "{{ dict(a=1, b=[2]) }}{{ dict(messages[0], role='x').role }}{{ {'a': {'b': 1}}.a.b }}"
    "{{ {'a': 1} | dictsort }}",
    "{{ messages | groupby('role') | map('first') | list }}{{ [1, 2, 3] | select('odd') | list }}"
    "{{ 'a' | escape }}",
    "{% set c = cycler('x', 'y') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner(';') %}"
    "{{ j() }}{{ j() }}",
    "{{ messages[1].content.startswith(' H') }}{{ 'abc'.find('c') }}{{ 'AbC'.lower() }}{{ 'a'.isdigit() }}",
    "{% block head %}a{{ messages | length }}{% endblock %}{{ self.head() }}",
    "   {% if messages %}\n  a\n   {%- endif %}\n\n{%+ if true %} b {% endif -%}  \n c",
    "{% set a, b = 1, 2 %}{{ b }}{{ a }}{% if a == 1 and b == 2 or c %}yes{% elif c %}no{% endif %}",
    "{{ messages | string | length }}{{ messages[0].content | e }}{{ ('a' | safe) ~ '<' }}{{ 'a' 'b' }}",
    "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ bos_token is defined }}",
]


@pytest.mark.parametrize("source", SNIPPETS)
def test_a_template_renders_as_in_transformers(source: str) -> None:
    theirs: Any = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=True)
    assert [render(source, tools=None, documents=None, add_generation_prompt=True)] == theirs[0]


def test_the_time_is_that_of_the_rendering() -> None:
    now = datetime(2024, 2, 29, 12, 30)
    assert Sandbox("{{ strftime_now('%d %b %Y') }}").render({}, characters=0, now=now) == "29 Feb 2024"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ raise_exception('no') }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ ('{0.__class__}'.format(1)) }}{{ 1 + 'a' }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include 'a' %}",
        "{% import 'a' as b %}",
        "{% extends 'a' %}",
        "{{ lipsum() }}",
        "{{ nothing.at.all }}",
        "{{ {}.fromkeys([1]) }}",
        "{{ 'a' | no_filter }}",
        "{{ unclosed",
    ],
)
def test_what_a_template_must_not_do_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="the chat template refused these messages: ."):
        chatting(source, tmp_path).encode_chat(MESSAGES)


# ---------------------------------------------------------------- attacks

GROWN = "{% set ns = namespace(a=(1,), b=(1,)) %}{% for i in range(60) %}"
GROWN += "{% set ns.a = (ns.a, ns.a) %}{% set ns.b = (ns.b, ns.b) %}{% endfor %}"
"""Two values of 2**60 items each that take 120 tuples of memory."""

DOUBLED = "{%% set ns = namespace(s='aaaaaaaa') %%}{%% for i in range(60) %%}%s{%% endfor %%}"
MILLION = "{% set s = 'a' * 200000 %}{% for i in range(100000) %}"

ENDLESS = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    "loops over nothing": "{% for i in range(100000) %}"
    "{% for j in range(100000) if false %}x{% endfor %}{% endfor %}",
    "a loop in a block": "{% set x %}{% for i in range(100000) %}" + "y" * 20000 + "{% endfor %}{% endset %}",
    "a range": "{% for i in range(10**9) %}x{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "macros that write": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}"
    "{% endif %}aaaa{% endmacro %}{{ f(60) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "callers": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 40
    + "x" * 8
    + "{% endcall %}" * 40,
    "blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "a recursive loop": "{% for i in range(1000) recursive %}{{ loop(range(1000)) }}{% endfor %}",
    "calls": "{% for i in range(100000) %}{% for j in range(100000) if {}.get('a') %}{% endfor %}"
    "{% endfor %}",
    "filters": "{% for i in range(100000) %}{{ range(100000) | map('string') | list | length }}{% endfor %}",
    "sums": "{% for i in range(100000) %}{{ range(100000) | sum }}{% endfor %}",
    "arguments": "{% macro m() %}{% endmacro %}{% for i in range(100000) %}{{ m(*range(100000)) }}"
    "{% endfor %}",
    "comparing": MILLION + "{% if 'a' * 200000 == s %}{% endif %}{% endfor %}",
    "finding": MILLION + "{% if 'aaaaaaaab' in s %}{% endif %}{% endfor %}",
    "counting": MILLION + "{% if s.count('aaaab') %}{% endif %}{% endfor %}",
    "sorting": MILLION + "{{ s | sort | length }}{% endfor %}",
}
LARGE = {
    "a product": "{{ 'a' * 10**9 }}",
    "a product of a list": "{{ 10**9 * [0] }}",
    "joined doubling": DOUBLED % "{% set ns.s = ns.s ~ ns.s %}",
    "added doubling": DOUBLED % "{% set ns.s = ns.s + ns.s %}",
    "doubling in a block": DOUBLED % "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}",
    "doubling by join": DOUBLED % "{% set ns.s = [ns.s, ns.s] | join(ns.s) %}",
    "doubling by replace": DOUBLED % "{% set ns.s = ns.s.replace('a', ns.s) %}",
    "doubling by format": DOUBLED % "{% set ns.s = '%s%s' % (ns.s, ns.s) %}",
    "doubling of a list": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}"
    "{% set ns.s = ns.s * 2 %}{% endfor %}",
    "center": "{{ 'a' | center(10**9) }}",
    "center, the method": "{{ 'a'.center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "indent": "{{ 'a\nb' | indent(10**9) }}",
    "indent of many lines": "{{ ('a\n' * 100000) | indent(100000) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent and a star": "{{ '%*d' % (10**9, 1) }}",
    "percent by a filter": "{{ '%1000000000d' | format(1) }}",
    "percent by a test": "{{ '%1000000000d' is odd }}",
    "percent by another": "{{ ['%.1000000000f'] | select('divisibleby', 3) | list }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format in a format": "{{ '{:{}}'.format(1, 10**9) }}",
    "format by attr": "{{ ('{:1000000000}' | attr('format'))(1) }}",
    "format_map": "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
    "replace": "{{ ('a' * 100000) | replace('', 'b' * 100000) }}",
    "join": "{{ (['a'] * 100000) | join('b' * 100000) }}",
    "join of what is selected": "{% set s = 'x' * 100000 %}{{ ([s] * 100000) | select | join }}",
    "batch": "{{ [1] | batch(10**9, 0) | list | length }}",
    "slice": "{{ [1] | slice(10**9) | list | length }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "tojson": "{{ [[1]] | tojson(indent=10**9) }}",
    "tojson of depth": "{% set ns = namespace(a=[1]) %}{% for i in range(900) %}{% set ns.a = [ns.a] %}"
    "{% endfor %}"
    "{{ ([ns.a] * 100) | tojson(indent=100) }}",
    "an integer": "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}"
    "{% endfor %}",
    "a power": "{{ 10 ** (10**9) }}",
    "slices": "{% set ns = namespace(l=[]) %}" + MILLION + "{% set ns.l = ns.l + [s[1:]] %}{% endfor %}",
    "dicts": "{% set ns = namespace(l=[]) %}{% for i in range(100000) %}{% set ns.l = [ns.l, ["
    + "{}," * 2000
    + "]] %}{% endfor %}",
    "an error": "{{ raise_exception('a' * 10**7) }}",
    "a block by a filter": "{% filter center(10**9) %}a{% endfilter %}",
    "a constant while compiling": "{% autoescape 'a' | center(10**9) %}x{% endautoescape %}",
    "output": "{{ 'a' * 10**7 }}{{ 'a' * 10**6 }}",
    "comparing what is grown": GROWN + "{{ ns.a == ns.b }}",
    "finding what is grown": GROWN + "{{ ns.a in [ns.b] }}",
    "testing what is grown": GROWN + "{{ [ns.a] | select('eq', ns.b) | list | length }}",
    "printing what is grown": GROWN + "{{ ns.a }}",
    "printing what holds it": GROWN + "{{ ns }}",
    "joining what is grown": GROWN + "{{ ns.a ~ '' }}",
    "formatting what is grown": GROWN + "{{ '%s' % [ns.a] }}",
    "JSON of what is grown": GROWN + "{{ ns.a | tojson }}",
    "a key that is grown": GROWN + "{{ {ns.a: 1} | length }}",
    "an index that is grown": GROWN + "{{ {}[ns.a] }}",
    "get what is grown": GROWN + "{{ {}.get(ns.a) }}",
    "sorting what is grown": GROWN + "{{ [ns.a, ns.b] | sort | length }}",
    "views of what is grown": GROWN + "{% set d = {1: ns.a} %}{{ d.items() == {1: ns.b}.items() }}",
    "changes of what is grown": GROWN + "{% for x in [ns.a, ns.b] %}{{ loop.changed(x) }}{% endfor %}",
    "an error that is grown": GROWN + "{{ raise_exception(ns.a) }}",
    "words": "{{ ('a ' * 100000) | wordwrap(1) }}",
    "links": "{{ ('http://' * 30000) | urlize }}",
    "tags": "{{ ('<!--' * 50000) | striptags }}",
    "a sum of lists": "{{ ([[1] * 100] * 2000) | sum(start=[]) | length }}",
    "keys that meet": "{% set ns = namespace(l=[]) %}{% for i in range(5000) %}"
    "{% set ns.l = ns.l + [(i * (2**61 - 1), 1)] %}{% endfor %}{{ dict(ns.l) | length }}",
    "a long source": "x" * 70000,
    "a wide source": "{{ a" + " ~ a" * 10000 + " }}",
    "a deep source": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "a nested source": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "a chained source": "{{ a" + ".b" * 9000 + " }}",
}


def chatting(source: str, folder: Path) -> Tokenizer:
    (write_tokenizer(folder) / "chat_template.jinja").write_text(source)
    return Tokenizer.from_folder(folder)


@pytest.fixture
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_meter, "PROCESSOR_S", 0.05)


@pytest.mark.usefixtures("little_time")
@pytest.mark.parametrize("source", [*ENDLESS.values(), *LARGE.values()], ids=[*ENDLESS, *LARGE])
def test_an_attack_is_refused_soon(source: str, tmp_path: Path) -> None:
    ours, start = chatting(source, tmp_path), time.thread_time()
    with pytest.raises(GenerationError, match=r"template (was stopped|refused these messages): .") as error:
        ours.encode_chat(MESSAGES)
    assert time.thread_time() - start < 3  # the limit is 0.5 s; a busy machine counts more for the same work
    assert len(str(error.value)) < 400


@pytest.mark.usefixtures("little_time")
@pytest.mark.parametrize("name", [name for name in LARGE if not re.search("grown|holds|source|sum", name)])
def test_an_attack_is_refused_in_little_memory(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises((LimitError, jinja2.TemplateError)):
            render(LARGE[name])
        assert tracemalloc.get_traced_memory()[1] < 150 << 20
    finally:
        tracemalloc.stop()


def test_the_limit_holds_in_any_thread_and_ends_within_two_seconds(tmp_path: Path) -> None:
    ours, found = chatting(ENDLESS["counting"], tmp_path), []

    def attack() -> None:
        start = time.thread_time()
        with pytest.raises(GenerationError, match=r"template was stopped: it took over 0.5 s"):
            ours.encode_chat([])
        found.append(time.thread_time() - start)

    thread = threading.Thread(target=attack)
    thread.start()
    thread.join(60)
    assert 0.5 <= found[0] < 1


@pytest.mark.parametrize("name", ["center", "comparing what is grown", "percent"])
def test_a_meter_that_does_not_weigh_is_caught(
    monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path
) -> None:
    """Smaller, so that they end: without their cost, none of them is refused."""
    small = LARGE[name].replace("10**9", "5000").replace("1000000000", "5000").replace("60", "18")
    monkeypatch.setattr(template_meter, "MAX_WEIGHT", 10_000)
    monkeypatch.setattr(template_meter, "MAX_PRODUCT", 1000)
    monkeypatch.setattr(template_meter, "MADE_BYTES", 10_000)
    with pytest.raises(LimitError):
        render(small)
    monkeypatch.setattr(template_meter, "MAX_PRODUCT", 10**9)
    for cost in ("weigh", "require", "work"):
        monkeypatch.setattr(template_meter.Meter, cost, lambda *_: 0)
    sandbox._environment.cache_clear()
    assert render(small)


@pytest.mark.usefixtures("little_time")
@pytest.mark.parametrize(
    ("visit", "source"),
    [
        ("visit_For", "{% for i in range(100000) %}{% endfor %}" * 20),
        ("visit_Compare", GROWN.replace("60", "19") + "{{ ns.a == ns.b }}"),
        ("visit_Concat", "{% set s = 'a' * 10**6 %}{% set t = " + "s ~ " * 90 + "s %}"),
        ("visit_Getitem", "{% set s = 'a' * 10**6 %}{% set t = [" + "s[1:], " * 90 + "] %}"),
        (
            "visit_Macro",
            "{% macro m() %}{% set x = [" + "{}, " * 2000 + "] %}{% endmacro %}" + "{% set x = m() %}" * 500,
        ),
    ],
)
def test_each_report_is_needed(monkeypatch: pytest.MonkeyPatch, visit: str, source: str) -> None:
    """With it the template is refused, without it none of the others sees what it does."""
    with pytest.raises(LimitError):
        render(source)
    monkeypatch.setattr(Instrumentation, visit, Instrumentation.generic_visit)
    render(source)


# ---------------------------------------------------------------- ordinary templates


def test_limits_grow_with_the_conversation(tmp_path: Path) -> None:
    long = [{"role": ("user", "assistant")[i % 2], "content": "word " * 40_000} for i in range(21)]
    ours = chatting("{% for m in messages %}{{ m.role ~ m.content | trim }}{% endfor %}", tmp_path)
    assert len(ours.render_chat(long)) > 4_000_000
    many = [{"role": ("user", "assistant")[i % 2], "content": "a few words"} for i in range(2000)]
    gathered = "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m] %}{% endfor %}"
    assert chatting(gathered + "{{ ns.l | length }}", tmp_path).render_chat(many) == "2000"


def test_an_ordinary_rendering_takes_less_than_a_millisecond(tmp_path: Path) -> None:
    ours = chatting(
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('in turn') }}{% endif %}"
        "{{ '[' + m['role'] + '] ' + m['content'] | trim + eos_token }}"
        "{% endfor %}",
        tmp_path,
    )
    messages = [{"role": ("user", "assistant")[i % 2], "content": "a few words"} for i in range(9)]
    assert fastest(lambda: ours.render_chat(messages)) < 1e-3


def fastest(function: Callable[[], object], times: int = 50) -> float:
    found = []
    for _ in range(times):
        start = time.thread_time()
        function()
        found.append(time.thread_time() - start)
    return min(found)


def test_a_template_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = chatting("{{ messages | length }}", tmp_path)
    assert ours.render_chat(MESSAGES) == "4"
    monkeypatch.setattr("mistral_trt.runtime.text.sandbox.Sandbox", None)
    assert ours.render_chat(MESSAGES) == "4"
