"""Named errors. Each message is one line: what is wrong, with which file or key, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MedsdError(Exception):
    """Base of every error that a user can mend; commands print it as one line and exit with 1."""


class SlideError(MedsdError):
    """A slide file is missing, is not a slide, or cannot be decoded."""


class MissingMppError(SlideError):
    """The scale of a slide (micrometres per pixel) is unknown."""


class NotBrightFieldError(SlideError):
    """A slide is not stained tissue on bright glass (fluorescence, dark field, inverted colours)."""


class NoTissueError(MedsdError):
    """No tissue was found where some is needed."""


class DatasetError(MedsdError):
    """A data folder, manifest or label file is not as expected."""


class AnnotationError(MedsdError):
    """An annotation file cannot be read as polygons."""


class WeightsError(MedsdError):
    """A weights file is missing, damaged, or belongs to another network."""


class NetworkError(MedsdError):
    """A network or layer does not offer what is asked of it."""


class ChannelsCancelError(NetworkError):
    """A method's map of a layer is nothing but rounding, for its channels cancel."""


class TrainingError(MedsdError):
    """Training cannot go on (NaN loss, one class only, checkpoint of another run)."""


class ConfigError(MedsdError):
    """A configuration key or value is not known."""


class AreaError(ConfigError, ValueError):
    """An area that is to be read of a slide is none; a ValueError, too."""


class OutputError(MedsdError):
    """An output cannot be written."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The words ``; did you mean 'x'?`` for the known name closest to `name`, whatever its case, or an empty string."""
    spelt = {word.casefold(): word for word in known}
    match = difflib.get_close_matches(name.casefold(), spelt, n=1)
    return f"; did you mean '{spelt[match[0]]}'?" if match else ""
