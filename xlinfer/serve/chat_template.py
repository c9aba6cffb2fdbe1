"""A model's chat template, rendered where neither it nor a message can reach anything.

The template comes with the model and is trusted to be finite; what people send is not trusted at
all. Rendering is therefore an immutable sandbox whose output is read piece by piece, with a limit
on characters and on seconds checked at each piece, and where text cannot be multiplied. Templates
from requests are refused by the server, so no stranger ever writes a loop here.
"""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from xlinfer.request import InvalidRequest

MAX_CHARS = 64 * 2**20  # of one rendered conversation
MAX_SECONDS = 10.0
# What the caller decides by name may not be smuggled in as a template variable.
RESERVED = frozenset({"messages", "tools", "documents", "chat_template", "tokenize"}) | {
    "add_generation_prompt",
    "continue_final_message",
}
# Message fields a template may see, and those that must be empty because tools, audio and
# function calls are not served.
SEEN = frozenset({"role", "content", "name", "reasoning", "reasoning_content"})
UNSERVED = frozenset({"tool_calls", "tool_call_id", "function_call", "audio"})
EMPTY = frozenset({"refusal", "annotations"})  # replies carry them; sending them back is normal


class ChatTemplate:
    """Raises ValueError when `source` is not a template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except TemplateError as error:
            raise ValueError(f"The chat template does not parse: {error}") from None
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._takes_parts = _loops_over_content(tree)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt for `messages` as checked by `check_messages`.

        `continue_final_message` ends the prompt inside the last message, for the model to go on.
        Raises InvalidRequest when the template refuses the conversation or passes a limit.
        """
        if add_generation_prompt and continue_final_message:
            raise InvalidRequest(
                "continue_final_message",
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
            )
        if taken := sorted(RESERVED & set(kwargs or ())):
            raise InvalidRequest(
                "chat_template_kwargs", f"chat_template_kwargs must not set {', '.join(taken)}."
            )
        shown = [self._shown(message) for message in messages]
        prompt = self._render(shown, add_generation_prompt, kwargs or {})
        if not continue_final_message:
            return prompt
        # The end of the last message is found by a mark that no message holds.
        content, mark = shown[-1]["content"], "\ue000end of the final message\ue001"
        if not isinstance(content, str):
            raise InvalidRequest("messages", "The final message to continue must be plain text.")
        marked = [*shown[:-1], {**shown[-1], "content": content + mark}]
        before, found, _ = self._render(marked, False, kwargs or {}).rpartition(mark)
        if not found:
            raise InvalidRequest(
                "continue_final_message",
                "The final message cannot be continued: the chat template does not show it.",
            )
        # A template that trims messages would have trimmed this one, had it not borne the mark.
        return before if prompt.startswith(before) else before.rstrip()

    def _render(self, messages, add_generation_prompt, kwargs) -> str:
        pieces, size, deadline = [], 0, time.monotonic() + MAX_SECONDS
        # Callers' variables come first: none may replace a special token.
        variables = {"tools": None, "documents": None, **kwargs, **self._special_tokens}
        try:
            for piece in self._template.generate(
                **variables, messages=messages, add_generation_prompt=add_generation_prompt
            ):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARS or time.monotonic() > deadline:
                    raise InvalidRequest("messages", "The conversation is too large to render.")
        except InvalidRequest:
            raise
        except TemplateError as error:
            message = f"The chat template refused the messages: {error.message}"
            raise InvalidRequest("messages", message) from None
        except Exception as error:  # whatever Python raises inside somebody's template
            message = f"The chat template failed on the messages ({type(error).__name__})."
            raise InvalidRequest("messages", message) from None
        return "".join(pieces)

    def _shown(self, message: Mapping[str, object]) -> dict[str, object]:
        content = message["content"]
        if isinstance(content, str) or self._takes_parts:
            return dict(message)
        return {**message, "content": "\n".join(part["text"] for part in content)}  # type: ignore[attr-defined]


def check_messages(messages: object) -> tuple[list[dict[str, object]], list[str]]:
    """Messages a template may see, and the dotted names of fields that were left out.

    Content is a string or a list of {"type": "text", "text": ...}. Raises InvalidRequest.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequest("messages", "messages must be a non-empty list of messages.")
    checked, ignored = [], []
    for index, message in enumerate(messages):
        at = f"messages.{index}"
        if not isinstance(message, Mapping):
            raise InvalidRequest(at, f"{at} must be an object with role and content.")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise InvalidRequest(f"{at}.role", f"{at}.role must be a string such as 'user'.")
        if role in ("tool", "function"):
            raise InvalidRequest(f"{at}.role", f"{at}: messages of tools are not supported.")
        for name in sorted(UNSERVED):
            if message.get(name):
                raise InvalidRequest(f"{at}.{name}", f"{at}.{name} is not supported.")
        ignored += [f"{at}.{name}" for name in message if name not in SEEN | UNSERVED | EMPTY]
        shown = {name: message[name] for name in SEEN if message.get(name) is not None}
        reasoning = shown.pop("reasoning", None) or shown.get("reasoning_content")
        if reasoning is not None:
            shown["reasoning_content"] = reasoning
        shown["content"] = _content(message.get("content"), at, role)
        checked.append(shown)
    return checked, ignored


def _content(content: object, at: str, role: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list | tuple) or not content:
        raise InvalidRequest(
            f"{at}.content", f"{at}.content must be a string or a non-empty list of text parts."
        )
    parts = []
    for index, part in enumerate(content):
        where = f"{at}.content.{index}"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text"):
            raise InvalidRequest(
                f"{where}.type", f"{where}: only text parts are supported, got type {kind!r}."
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}.text", f"{where}.text must be a string.")
        parts.append({"type": "text", "text": part["text"]})
    return parts


class _Sandbox(ImmutableSandboxedEnvironment):
    """Without products that make much from little: 'a' * 10**9, or 9**9**9."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context, operator, left, right):
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and len(text) * int(times) > 2**16:
                    raise SecurityError("a text is multiplied too often")
        elif abs(right) > 64:
            raise SecurityError("an exponent is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}` marks what the model wrote, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  jinja2 reads a class attribute

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether the template walks a message's parts itself, so that it may be given a list."""
    for loop in tree.find_all(nodes.For):
        match loop.iter:
            case nodes.Getattr(attr="content"):
                return True
            case nodes.Getitem(arg=nodes.Const(value="content")):
                return True
            case nodes.Name(name="content"):
                return True
    return False


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # As transformers defines it: jinja2's own would escape <, > and & for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: object):
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
