"""Docstrings and identifiers as plain words, and the removal of a name from its own description."""

from __future__ import annotations

import inspect
import re

_SUBTOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_MARKUP = re.compile(r":\w+(?::\w+)?:`~?([^`<]*)(?:<[^`]*>)?`|`{1,2}([^`]*)`{1,2}_{0,2}|\*{1,2}([^\s*][^*]*)\*{1,2}")
_DIRECTIVE = re.compile(r"^\s*(\.\. |>>> |[-=~^*#+]{3,}\s*$|:\w+[^:`]*:(?!`))")
_SIGNATURE = re.compile(r"\s*[\w.]+\(.*\)\s*(->\s*\S.*)?")
_INFLECTION = re.compile(r"(ing|ed|es|s|e)$")


def subtokens(identifier: str) -> list[str]:
    """Splits an identifier or a sentence into lower-case words: `readCSVFile_2` -> `read csv file 2`."""
    return [token.lower() for token in _SUBTOKEN.findall(identifier)]


def words(text: str) -> str:
    """Normalises a text for every retriever here, learned or not: lower-case words, identifiers split."""
    return " ".join(subtokens(text))


def first_paragraph(docstring: str) -> str:
    """Extracts the first paragraph of prose: signatures, directives and markup dropped, whitespace collapsed."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = [line for line in block.splitlines() if not _DIRECTIVE.match(line)]
        while lines and _SIGNATURE.fullmatch(lines[0]):
            lines.pop(0)
        joined = " ".join(lines)
        if _SIGNATURE.fullmatch(joined):
            continue
        prose = _MARKUP.sub(lambda match: next((group for group in match.groups() if group), ""), joined)
        prose = re.sub(r"<?https?://[^\s>]*>?_*", " ", prose)
        prose = re.sub(r"\s+", " ", prose).strip()
        if prose:
            return prose
    return ""


def remove_name(text: str, name: str) -> str:
    """Removes `name` from `text` however it is spelt: `read_csv`, `pd.read_csv()`, `ReadCSV`, `read csv`, `read-csvs`.

    Sub-tokens go only where together, and in order, they are the whole name.
    """
    parts = subtokens(name)
    if not parts:
        return text
    whole = r"[\s_\-]*".join(map(re.escape, parts))
    pattern = rf"(?<![A-Za-z0-9])(?:[A-Za-z_]\w*\.)*_*{whole}(?:e?s|e?d|ing)?_*(?![A-Za-z0-9])(?:\(\))?"
    return re.sub(r"\s+", " ", re.sub(pattern, " ", text, flags=re.IGNORECASE)).strip()


def remove_name_words(text: str, name: str) -> str:
    """Removes from the words of `text` those that `name` is made of, whatever their simple ending."""
    stems = {_stem(token) for token in subtokens(name)}
    return " ".join(token for token in subtokens(text) if _stem(token) not in stems)


def _stem(word: str) -> str:
    return _INFLECTION.sub("", word) if len(word) > 3 else word
