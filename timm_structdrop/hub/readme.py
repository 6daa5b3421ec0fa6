"""A repository's README with a card in it: what people wrote around the card stays."""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["updated_readme"]

START = "<!-- timm_structdrop writes this part again at every push -->"
END = "<!-- end of the part that timm_structdrop writes -->"
METADATA = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def updated_readme(existing: str | None, card: str) -> str:
    """The README to push.

    The card's metadata are laid over the existing ones (tags of both stay). Its text takes the
    place of the card that was pushed before; a README without one keeps its text below the card.

    Args:
        existing: the README in the repository; None where there is none.
        card: metadata between ``---`` lines, and text.
    """
    data, body = _split(card)
    written = f"{START}\n\n{body.strip()}\n\n{END}"
    before, text = _split(existing or "")
    tags = [*_strings(data.get("tags")), *_strings(before.get("tags"))]
    merged = {**before, **data, **({"tags": list(dict.fromkeys(tags))} if tags else {})}
    start, end = text.find(START), text.find(END)
    if 0 <= start < end:
        text = f"{text[:start]}{written}{text[end + len(END) :]}"
    else:
        text = f"{written}\n\n{text}"
    metadata = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)
    return f"---\n{metadata}---\n\n{text.strip()}\n"


def _split(readme: str) -> tuple[dict[str, Any], str]:
    """Metadata and text; metadata that cannot be read count as none."""
    match = METADATA.match(readme)
    if match is None:
        return {}, readme
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError:
        data = None
    return data if isinstance(data, dict) else {}, readme[match.end() :]


def _strings(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []
