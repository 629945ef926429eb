"""Renders chats with Jinja templates in the way that the templates' authors tested them."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lsjax.runtime.errors import ChatTemplateError


class _GenerationBlock(Extension):
    """Accepts ``{% generation %}``, which marks the assistant's words, for training only."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, and models never saw such escapes in training.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    # Templates come with the model's files, so they run sandboxed like any untrusted program.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _plain(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a message as templates expect it: content is text, and null values have no key."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ChatTemplateError(f"{where} must be an object whose role is text.")
    plain = {k: v for k, v in message.items() if v is not None}
    if "content" in plain:
        plain["content"] = _text(plain["content"], where)
    if "tool_calls" in plain:
        plain["tool_calls"] = _tool_calls(plain["tool_calls"], where)
    return plain


def _text(content: Any, where: str) -> str:
    """Returns content that is text, or joins a list of text parts with newlines."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ChatTemplateError(
            f"{where} has a content that is neither text nor a list of text parts but a "
            f"{type(content).__name__}; only text can be read."
        )
    texts = []
    for part in content:
        known = isinstance(part, Mapping) and part.get("type") == "text"
        if not known or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ChatTemplateError(
                f"{where} has a part of type {kind!r} in its content; only text can be read, as in "
                '{"type": "text", "text": "Hello"}.'
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Returns tool calls with arguments as objects, which clients may send as JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ChatTemplateError(f"{where} has tool_calls that are not a list of objects.")
    found = []
    for call in calls:
        inner = call.get("function", call)
        if not isinstance(inner, Mapping):
            raise ChatTemplateError(f"{where} calls a function that is not an object.")
        if isinstance(inner.get("arguments"), str):
            try:
                arguments = json.loads(inner["arguments"])
            except (ValueError, RecursionError):
                arguments = None
            if not isinstance(arguments, dict):
                raise ChatTemplateError(
                    f"{where} calls a function with arguments that are no JSON object: "
                    f"{inner['arguments'][:60]!r}."
                )
            inner = {**inner, "arguments": arguments}
        found.append({**call, "function": inner} if "function" in call else dict(inner))
    return found


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Renders ``messages`` with a Jinja chat ``template``.

    ``arguments`` are extra template variables, such as ``enable_thinking``.

    Raises ``ChatTemplateError`` if the template is malformed, violates the sandbox, or refuses the
    messages.
    """
    if not messages:
        raise ChatTemplateError("a chat needs at least one message.")
    plain = [_plain(message, f"message {i}") for i, message in enumerate(messages)]
    taken = {"messages", "add_generation_prompt", *special_tokens}.intersection(arguments)
    if taken:
        raise ChatTemplateError(f"{min(taken)} is given to every chat template; leave it out.")
    try:
        return _compile(template).render(
            {"tools": None, "documents": None}
            | dict(arguments)
            | dict(special_tokens)
            | {"messages": plain, "add_generation_prompt": add_generation_prompt}
        )
    except Exception as error:  # a template is a program and can fail in any way
        raise ChatTemplateError(
            f"the chat template failed: {type(error).__name__}: {error}; check the messages' "
            "roles, or give another template with --chat_template."
        ) from error
