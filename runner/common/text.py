"""Removes control characters, which could manipulate a terminal, from text in untrusted files."""

import re

ESCAPED = rb"(?<!\\)((?:\\\\)*)\\(?:u00(?:[01][0-9a-fA-F]|7[fF]|[89][0-9a-fA-F])|[bfr])"
RAW = rb"\x7f|\xc2[\x80-\x9f]"  # in JSON, all other control characters are escaped
IN_JSON = re.compile(ESCAPED + b"|" + RAW)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def without_controls(content: bytes) -> bytes:
    """Replaces the control characters in JSON strings, except line breaks and tabs, with U+FFFD."""
    return IN_JSON.sub(rb"\1\\ufffd", content)


def printable(value: object) -> str:
    """Escapes what cannot be encoded or printed: file names may contain invalid Unicode and control characters."""
    text = str(value).encode(errors="backslashreplace").decode()
    return CONTROL.sub(lambda control: f"\\x{ord(control[0]):02x}", text)
