"""Removes control characters, which could manipulate a terminal, from text in untrusted files.

Those that change the direction of writing are among them: with them, a name could look like another.
"""

import re

DIRECTION = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_HEX = "|".join(f"{ord(letter):04x}" for letter in DIRECTION).encode()
_CODES = rb"u00(?:[01][0-9a-fA-F]|7[fF]|[89][0-9a-fA-F])|u(?i:" + _HEX + rb")|[bfr]"
ESCAPED = rb"(?<!\\)((?:\\\\)*)\\(?:" + _CODES + rb")"
RAW = rb"\x7f|\xc2[\x80-\x9f]|" + "|".join(DIRECTION).encode()  # in JSON, all other control characters are escaped
IN_JSON = re.compile(ESCAPED + b"|" + RAW)
CONTROL = re.compile(rf"[\x00-\x1f\x7f-\x9f{DIRECTION}]")


def without_controls(content: bytes) -> bytes:
    """Replaces the control characters in JSON strings, except line breaks and tabs, with U+FFFD."""
    return IN_JSON.sub(rb"\1\\ufffd", content)


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, which may have many, or the name of its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def printable(value: object) -> str:
    """Escapes what cannot be encoded or printed: file names may contain invalid Unicode and control characters."""
    text = str(value).encode(errors="backslashreplace").decode()
    return CONTROL.sub(lambda control: control[0].encode("unicode_escape").decode(), text)
