"""Rendering chats with Jinja templates the way the templates' authors tested them."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lsjax.tokenizer.errors import ChatTemplateError


class _GenerationBlock(Extension):
    """Accepts ``{% generation %}``, which marks the assistant's words for training only."""

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
    # Jinja's own filter escapes HTML characters, which a model never saw in training.
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
    # A template comes with the model's files, so it runs sandboxed like any untrusted program.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
) -> str:
    """Render ``messages`` with a Jinja chat ``template``.

    Raises ``ChatTemplateError`` where the template is malformed, leaves the sandbox, or refuses
    the messages.
    """
    if not messages:
        raise ChatTemplateError("a chat needs at least one message.")
    # Templates test whether a key is there; an absent value must look like an absent key.
    plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
    try:
        return _compile(template).render(
            **special_tokens,
            messages=plain,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template is a program: it can fail in any way
        raise ChatTemplateError(
            f"the chat template failed: {type(error).__name__}: {error}; check the messages' "
            "roles, or give another template with --chat_template."
        ) from error
