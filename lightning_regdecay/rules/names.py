"""What groups are called, and which name a user may have meant. Knows no rules and no model."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import re
from collections.abc import Collection, Iterable

TOTAL = "total"
"""What stands for all groups, where else the name of one does."""
REGEX_PREFIX = "re:"
"""What makes a pattern a regular expression."""

_LONGEST = 64

# What a regular expression holds beside the text that it looks for, to be taken out of it in this order.
_REGEX_PARTS = (
    r"\(\?<?[=!][^)]*\)",  # what must or must not stand beside the match
    r"\(\?(P<\w+>|[\w-]*:?)",  # the opening of a named group, a group without a number, a flag
    r"(?<!\\)\[[^]]*\]",  # classes of characters, also by letter:
    r"\\[A-Za-z]",
    r"(?<!\\)\.[*+?]",  # any characters
    r"\{[^}]*\}",  # how often
    r"[\\^$*+?()]",
)


def literal_text(pattern: str) -> str:
    r"""A pattern less its wildcards and the dots that they leave bare.

    >>> [literal_text(p) for p in ("*.bias", "encoder.*.weight", "layer[0-3].*", r"re:\.(q|k)_proj\.weight$", "*")]
    ['bias', 'encoder.weight', 'layer', 'q_k_proj.weight', '']
    """
    if pattern.startswith(REGEX_PREFIX):
        text = pattern.removeprefix(REGEX_PREFIX)
        for part in _REGEX_PARTS:
            text = re.sub(part, "", text)
        text = text.replace("|", "_")
    else:
        text = re.sub(r"\[[^]]+\]|[*?]", "", pattern)
    return ".".join(part for part in text.split(".") if part)


def name_of_pattern(pattern: str) -> str:
    """The name of the group that a pattern makes.

    >>> [name_of_pattern(pattern) for pattern in ("*.bias", "*norm*", "head.*", "encoder.*.weight", "*")]
    ['bias', 'norm', 'head', 'encoder.weight', 'rest']
    """
    text = literal_text(pattern)
    return safe_name(text) if text else "rest"


def safe_name(text: str) -> str:
    """A name that every logger takes: letters, digits, ``_``, ``-`` and ``.`` only, and not too many.

    MLflow (3.17) takes keys of up to 250 characters. A longer text is cut, and ends in what tells it from others.

    >>> safe_name("no decay"), safe_name("*_" * 100)
    ('no_decay', '________________________________________________________6447caa7')
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", text)
    if not name.strip("."):
        name = "_" * len(name) or "_"  # of dots alone, a file system makes folders
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 8]}{hashlib.sha1(text.encode()).hexdigest()[:8]}"


def unique_name(name: str, taken: Collection[str]) -> str:
    """The name, or where it is taken the name with the first free number after it.

    >>> unique_name("bias", {"bias", "bias_2"})
    'bias_3'
    """
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return name if name not in taken else next(candidate for candidate in numbered if candidate not in taken)


def hint(word: str, known: Iterable[str]) -> str:
    """For messages: the nearest of the known words, or all of them where none is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"
