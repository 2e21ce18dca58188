"""Chat templates: from messages to text, and which of its characters the assistant wrote."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from megatron_ogpsa.data.extras import Extras
from megatron_ogpsa.data.limits import limited
from megatron_ogpsa.data.messages import Message
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system.files import file_error

Span = tuple[int, int]  # characters, [begin, end)

_GENERATION_TAG = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")

_POWER = ("operator", "**")

_SHIPPED = Path(__file__).with_name("templates")

# For one conversation, which takes milliseconds and kilobytes.
_SECONDS = 5.0
_BYTES = 4 << 30
_MOST_CHARACTERS = 1 << 26

# Llama 3 templates print today's date unless told one, Mistral's ask ``strftime_now`` for it. Data must not depend on the day
# it is tokenized; this is the date to which those of Llama 3 themselves fall back.
_FIXED_DATE = "26 Jul 2024"
_FIXED_DAY = date(2024, 7, 26)


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and the variables it sees (``bos_token``, ``eos_token``, ...).

    Rendered by transformers' sandboxed environment, so a template means here what it means to every other user of it: it
    sees the conversation and nothing else of this process. Time and memory are limited as well.
    """

    source: str
    variables: dict[str, str]
    name: str
    """Where the template comes from, for error messages."""

    def __post_init__(self) -> None:
        """Compile once, so that a broken template is known before any data is read.

        Raises:
            UserError: not valid Jinja, with the line.
        """
        try:
            powers = [line for line, kind, token in jinja2.Environment().lex(self.source) if (kind, token) == _POWER]
            if powers:  # Jinja computes constants when it compiles, and nothing interrupts 9 ** 9 ** 9
                raise UserError(f"{self.name}:{powers[0]}: '**' has no place in a chat template; write the number")
            with _limited():
                render_jinja_template(conversations=[], chat_template=self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{self.name}:{error.lineno}: {error.message}; mend the chat template") from error
        except UserError:
            raise
        except Exception as error:  # Python compiles what Jinja makes of a template, and refuses in its own ways
            raise UserError(f"{self.name}: {_fault(error)}; mend the chat template") from error

    def render(
        self, messages: list[Message], *, add_generation_prompt: bool = False, extras: Extras | None = None
    ) -> str:
        """The text of a conversation; with ``add_generation_prompt`` up to where the assistant is to go on.

        A template of a model that may think first (Qwen3) is then told not to, by ``enable_thinking``: what it supervises
        in a last turn has no thoughts either, and others do not know the variable. ``extras`` that say otherwise win.

        Raises:
            UserError: the template refuses the conversation or is itself broken.
        """
        with _limited():
            thinking = {"enable_thinking": False} if add_generation_prompt else {}
            return self._render(messages, thinking | (extras or {}), add_generation_prompt)[0]

    def render_with_spans(
        self, messages: list[Message], *, answer_from: int = 0, extras: Extras | None = None
    ) -> tuple[str, list[Span]]:
        """The text of a conversation and the spans the assistant wrote, the end of its turns included.

        Only turns from message ``answer_from`` on count: what comes before is prompt, the assistant's turns in it too.

        A template with ``{% generation %}`` says itself what the assistant writes. For any other, the assistant's span
        of turn i is what its message adds: from the end of ``messages[:i]`` rendered with the generation prompt to the
        end of ``messages[:i + 1]``. A template that writes a header for the assistant and ignores
        ``add_generation_prompt`` makes that header part of the span; mark such a template with ``{% generation %}``.

        Args:
            extras: variables of the template, see :mod:`megatron_ogpsa.data.extras`.

        Raises:
            UserError: the template refuses the conversation, or what it writes for a turn (or for the prompt) changes
                when later turns follow, so that the spans cannot be known.
        """
        with _limited():
            if _GENERATION_TAG.search(self.source):
                return self._marked_spans(messages, answer_from, extras or {})
            return self._added_spans(messages, answer_from, extras or {})

    def _added_spans(self, messages: list[Message], answer_from: int, extras: Extras) -> tuple[str, list[Span]]:
        text = self._render(messages, extras)[0]
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and index >= answer_from:
                before = self._render(messages[:index], extras, add_generation_prompt=True)[0]
                through = self._render(messages[: index + 1], extras)[0]
                if not (text.startswith(through) and through.startswith(before)):
                    raise UserError(
                        f"the chat template writes message {index + 1} differently when others follow, so the"
                        " assistant's words cannot be told apart; mark them with {% generation %} in the template"
                        f" (--chat-template FILE.jinja), or for a model of that name say --chat-template {_shipped()}"
                    )
                spans.append((len(before), len(through)))
        return text, spans

    def _marked_spans(self, messages: list[Message], answer_from: int, extras: Extras) -> tuple[str, list[Span]]:
        """The spans in ``{% generation %}``, of which a turn may have any number: so the prompt ends by its characters."""
        text, spans = self._render(messages, extras)
        if not any(message["role"] == "assistant" for message in messages[:answer_from]):
            return text, spans
        prompt = self._render(messages[:answer_from], extras)[0]
        if not text.startswith(prompt):
            raise UserError(
                "the chat template writes the prompt differently when an answer follows, so the answer cannot be told"
                " apart from the assistant's earlier turns; mend the template (--chat-template)"
            )
        return text, [span for span in spans if span[0] >= len(prompt)]

    def _render(
        self, messages: list[Message], extras: Extras, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        tracking = _GENERATION_TAG.search(self.source) is not None
        variables: dict[str, Any] = {"date_string": _FIXED_DATE, **extras, **self.variables}
        try:
            # A variable cannot be a function there; what is compiled stays in that library's cache, for the call below.
            _compile_jinja_template(self.source).globals["strftime_now"] = _FIXED_DAY.strftime
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.source,
                return_assistant_tokens_mask=tracking,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
            texts[0].encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"the chat template writes half of a surrogate pair (character {error.start}); mend the row or the template"
            ) from error
        except Exception as error:  # a template may raise whatever Python raises
            raise UserError(
                f"the chat template refuses the conversation ({_fault(error)}); mend the row or the template"
            ) from error
        if len(texts[0]) > _MOST_CHARACTERS:
            raise UserError(f"the chat template writes {len(texts[0])} characters; mend the row or the template")
        return texts[0], spans[0] if tracking else []


def _shipped() -> str:
    return ", ".join(sorted(path.stem for path in _SHIPPED.glob("*.jinja")))


def is_shipped(source: str) -> bool:
    """Whether it is the text of a template that comes with this project."""
    return any(path.read_text(encoding="utf-8") == source for path in _SHIPPED.glob("*.jinja"))


def _limited() -> AbstractContextManager[None]:
    return limited(seconds=_SECONDS, num_bytes=_BYTES)


def _fault(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_template_file(path: str) -> str:
    """Text of a Jinja file, or of a template that comes with this project, by its name: a file of that name wins.

    Raises:
        UserError: it is missing, a directory, not UTF-8, or empty.
    """
    shipped = _SHIPPED / f"{path}.jinja"
    if re.fullmatch(r"[\w.-]+", path) and not Path(path).is_file() and shipped.is_file():
        return shipped.read_text(encoding="utf-8")
    try:
        source = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--chat-template {path}: not UTF-8 (byte offset {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise file_error(
            error, f"--chat-template {path}: {error.strerror}; give the path of a Jinja file, or {_shipped()}"
        ) from error
    if not source.strip():
        raise UserError(f"--chat-template {path}: the file is empty; give a Jinja chat template")
    return source
