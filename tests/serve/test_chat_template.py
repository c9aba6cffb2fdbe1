import json
import time

import pytest

from xlinfer.request import InvalidRequest
from xlinfer.serve import chat_template
from xlinfer.serve.chat_template import ChatTemplate, check_messages

LOOP = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
ASK = LOOP + "{% if add_generation_prompt %}[assistant:{% endif %}"
USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages=USER, **options) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **options)


def test_blocks_are_trimmed_as_transformers_does():
    source = (
        "{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}"
    )
    assert render(source) == "user\n"


def test_extensions():
    source = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
    )
    assert render(source, USER * 3) == "hihi"
    assert render("{{ bos_token }}{{ {'é': '<&>'} | tojson }}") == '<s>{"é": "<&>"}'
    assert json.loads(render("{{ messages | tojson(indent=2) }}")) == USER
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render("{{ thinking }}", kwargs={"thinking": True}) == "True"


def test_a_template_may_refuse():
    with pytest.raises(
        InvalidRequest, match="refused the messages: roles must alternate"
    ) as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ''.__class__.x }}",
        "{% include '/etc/passwd' %}",
        "{{ 'a' * 100000000 }}",
        "{{ [0] * 100000000 }}",
        "{{ 100000000 * messages }}",
        "{{ 2 ** 100000000 }}",
        "{{ range(1000000000) | list }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_a_template_cannot_do(source):
    start = time.monotonic()
    with pytest.raises(InvalidRequest) as caught:
        render(source)
    assert caught.value.param == "messages" and time.monotonic() - start < 2


def test_the_inside_of_python_is_not_there():
    assert render("{{ lipsum.__globals__ }}{{ messages.__class__ }}{{ m.__init__ }}") == ""


def test_output_and_time_are_bounded(monkeypatch):
    bomb = "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' }}{% endfor %}{% endfor %}"
    monkeypatch.setattr(chat_template, "MAX_CHARS", 10_000)
    with pytest.raises(InvalidRequest, match="too large"):
        render(bomb)
    monkeypatch.setattr(chat_template, "MAX_CHARS", 10**9)
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.05)
    with pytest.raises(InvalidRequest, match="too large"):
        render(bomb)


def test_callers_variables_replace_nothing():
    for name in ("messages", "tools", "chat_template", "tokenize", "add_generation_prompt"):
        with pytest.raises(InvalidRequest, match=f"must not set {name}"):
            render(ASK, kwargs={name: 1})
    assert render("{{ bos_token }}", kwargs={"bos_token": "evil"}) == "<s>"


@pytest.mark.parametrize("content", ["Once upon", "Once upon ", "[x:y]", "{{ 1 }}"])
@pytest.mark.parametrize("shown", ["m.content", "m.content | trim"])
def test_continue_final_message(content, shown):
    messages = [*USER, {"role": "assistant", "content": content}]
    source = ASK.replace("m.content", shown)
    options = {"add_generation_prompt": False, "continue_final_message": True}
    want = content if "trim" not in shown else content.strip()
    assert render(source, messages, **options) == f"[user:hi][assistant:{want}"


def test_continue_final_message_refusals():
    with pytest.raises(InvalidRequest, match="Cannot set both"):
        render(ASK, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="does not show it"):
        render("fixed", continue_final_message=True, add_generation_prompt=False)


def test_parts_are_joined_unless_the_template_takes_them():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages, _ = check_messages([{"role": "user", "content": parts}])
    assert render(ASK, messages) == "[user:a\nb][assistant:"
    walks = (
        "{% for m in messages %}{% for p in m['content'] %}({{ p.text }}){% endfor %}{% endfor %}"
    )
    assert render(walks, messages) == "(a)(b)"


def test_checked_messages():
    messages = [
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], "x": 1},
        {"role": "user", "content": ["a", {"type": "input_text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": "c", "reasoning": "because"},
    ]
    checked, ignored = check_messages(messages)
    assert ignored == ["messages.0.x"]
    assert checked[0] == {"role": "assistant", "content": ""}
    assert checked[1]["name"] == "me"
    assert checked[2]["reasoning_content"] == "because" and "reasoning" not in checked[2]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ("hi", "messages"),
        ([], "messages"),
        (["hi"], "messages.0"),
        ([{"role": 3, "content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": []}], "messages.0.content"),
        ([{"role": "user", "content": 7}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages.0.content.0.type"),
        ([*USER, {"role": "assistant", "content": "", "tool_calls": [1]}], "messages.1.tool_calls"),
        ([{"role": "function", "content": "x"}], "messages.0.role"),
    ],
)
def test_bad_messages(messages, param):
    with pytest.raises(InvalidRequest) as caught:
        check_messages(messages)
    assert caught.value.param == param
