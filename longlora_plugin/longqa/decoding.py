"""Bytes of a text file become text; what is none becomes one clear reason."""

from __future__ import annotations

import contextlib
import re


class Unreadable(ValueError):
    """Why one file gives no document; its message goes to the report."""


def decode(raw: bytes, encoding: str | None = None) -> str:
    """Text of `raw`: UTF-8 (with or without a mark), else `encoding`, else what is detected.

    Args:
        encoding: of files that are not UTF-8; None: chardet judges.

    Raises:
        Unreadable: no known encoding, or the bytes are no text.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        name = encoding or _detect(raw)
        try:
            text = raw.decode(name or "ascii").removeprefix("\ufeff")
        except (UnicodeDecodeError, LookupError):
            raise Unreadable(
                f"is neither UTF-8 nor {name}; save it as UTF-8"
                if name
                else "is in no known encoding (it may not be text); save it as UTF-8"
            ) from None
    strange = sum(1 for char in text[:200_000] if not (char.isprintable() or char in "\t\n\r\f"))
    if strange > 0.01 * min(len(text), 200_000):
        raise Unreadable("is binary, not text")
    return text


def _detect(raw: bytes) -> str | None:
    from chardet import detect

    wide = b"\x00" in raw[:1000] or raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    if wide:
        return detect(raw[:100_000])["encoding"]
    # Only lines beyond ASCII tell encodings apart, and they may come late in a long file.
    telling = b"\n".join(re.findall(rb"[^\n]*[\x80-\xff][^\n]*", raw)[:2000])
    found = detect(telling[:100_000])["encoding"]
    foreign = len(re.findall(rb"[\x80-\xff]", raw))
    if found and foreign < 0.04 * len(raw):
        # A few quotation marks and dashes are too little to judge by; this is what they mostly are.
        with contextlib.suppress(UnicodeDecodeError):
            raw.decode("cp1252")
            return "cp1252"
    return found
