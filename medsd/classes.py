"""Names of classes: what may be one, which number a word means, and which class is asked about.

The first class is that of normal tissue: what nobody outlined on a slide that is outlined in full.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from medsd.errors import ConfigError, nearest

CLASSES = ("normal", "tumour")
"""The usual names of the classes."""

# Kinds of tiles in the columns of `slides.csv`, where a class of the name would be a second of these.
_KINDS = ("mixed", "shared", "unseen")


def checked_classes(names: Iterable[object]) -> tuple[str, ...]:
    """The names, two or more, that of normal tissue first.

    Raises:
        ConfigError: they are fewer, no texts, alike in any case, or a word that tables use.
    """
    found = [names] if isinstance(names, str) else list(names)
    if len(found) < 2:
        raise ConfigError(f"classes={found}: name two or more, that of normal tissue first")
    texts: list[str] = []
    for name in found:
        if not isinstance(name, str) or not name.strip() or name != name.strip() or not name.isprintable():
            raise ConfigError(f"classes={found}: {name!r} is no name; give text")
        if folded(name) in map(folded, texts):
            raise ConfigError(f"classes={found}: {name!r} is there twice; names differ in more than case")
        if folded(name) in _KINDS:
            raise ConfigError(f"classes={found}: {name!r} is what tables call other tiles; choose another name")
        texts.append(name)
    return tuple(texts)


def folded(word: str) -> str:
    """A word as classes are compared: in any case, "tumor" for "tumour"."""
    return word.strip().casefold().replace("tumour", "tumor")


def class_number(names: Sequence[str], word: str) -> int | None:
    """The number of the class that a word means; None for no class.

    Example:
        >>> class_number(("normal", "tumour"), "Tumor"), class_number(("benign", "malignant"), "tumour")
        (1, None)
    """
    return {folded(name): number for number, name in enumerate(names)}.get(folded(word))


def target_number(names: Sequence[str], target: str | None) -> int:
    """The number of the class that is asked about: that of the name, or the second, which follows the normal one.

    Raises:
        ConfigError: there is no class of the name.

    Example:
        >>> target_number(("benign", "in situ", "invasive"), "invasive"), target_number(("normal", "tumour"), None)
        (2, 1)
    """
    if target is None:
        return min(1, len(names) - 1)
    number = class_number(names, str(target))  # a command line gives the class '1' as a number
    if number is None:
        raise ConfigError(f"target='{target}': the classes are {', '.join(names)}{nearest(str(target), names)}")
    return number
