"""The page of errors has every message of the library, word for word, and raises each kind of error once."""

from __future__ import annotations

import ast
import re

import messages
import pytest
from messages import Message

from nicehooks import errors


def test_the_page_has_every_message() -> None:
    """`make messages` writes it anew."""
    wanted, _, shown = messages.PAGE.read_text().partition(messages.HEADING)
    assert wanted.strip()
    assert (messages.HEADING + shown).splitlines() == messages.section().splitlines(), "make messages"


def test_every_message_is_found() -> None:
    """Of constants, of texts with values in them, of those that a helper makes, of lines put together, of reasons."""
    found = messages.messages()
    for kind, text in (
        ("SiteNotFound", "… has no parameter or buffer …."),
        ("PathError", "this bracket is never closed\n    …\n    …^"),
        ("ValueError", "keep=…: it is 'first', 'last' or 'all'"),
        ("SiteNotFound", "no module matches … in ….\n…"),
        ("SiteNotReached", "… was never reached in …: the model ran, but not once with ….\n  while … was active"),
        ("NotCalledWarning", "… was left, but the model was not called in it."),
    ):
        assert Message(kind, text) in found


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ('def f(x): raise TypeError(f"{x} is no number")', {"… is no number"}),
        ('def f(x): raise TypeError("a" if x else "b {}".format(x))', {"a", "b …"}),
        ('def f(x):\n text = "a"\n if x: text += " b"\n raise TypeError(text)', {"a", "… b"}),
        ("def f(x): raise TypeError(x)", set()),
    ],
)
def test_texts_are_read_from_the_source(source: str, said: set[str]) -> None:
    (function,) = ast.parse(source).body
    assert {text for _, text, _ in messages.said_in(function)} == said


KINDS = [
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.NiceHooksError | errors.NiceHooksWarning)
]
"""Those of the command alone have no name that a caller needs."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_error_stands_on_the_page_before_the_list(kind: str) -> None:
    assert re.search(rf"^([├└│─ ]*){kind}( |$)", messages.rest(), re.MULTILINE)
