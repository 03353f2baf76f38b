"""What images with masks are to training and scoring, whichever kind of data they come from; parts by patient."""

from __future__ import annotations

import logging
from typing import Protocol, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medsd.checks import check_number
from medsd.cohort.split import PARTS
from medsd.errors import DatasetError
from medsd.slides.readers.base import RGB

logger = logging.getLogger(__name__)

Numbers = npt.NDArray[np.uint8]


class MaskedSample(TypedDict):
    """An image (3, S, S) uint8 and the class number of each pixel (1, S, S) uint8, 0 the background."""

    image: Tensor
    label: Tensor


class MaskedItems(Protocol):
    """A data set of images with masks.

    Attributes:
        groups: (n,) what draws are made even over, such as patients.
        units: (n,) what items are scored together as: an image, a slide, a volume.
        patients: (n,) what intervals resample.
    """

    groups: npt.NDArray[np.str_]
    units: npt.NDArray[np.str_]
    patients: npt.NDArray[np.str_]

    def __len__(self) -> int: ...

    def __getitem__(self, item: int) -> MaskedSample: ...

    def place(self, item: int) -> str:
        """The file of an item, and where in it."""
        ...


def as_masked_sample(pixels: RGB, mask: Numbers) -> MaskedSample:
    """The sample of RGB pixels (height, width, 3) and class numbers (height, width), which it does not share."""
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    return {"image": image, "label": torch.from_numpy(mask.astype(np.uint8)[None].copy())}


def deal_parts(
    patients: npt.NDArray[np.str_],
    given: npt.NDArray[np.str_],
    shares: tuple[float, float],
    seed: int,
    strata: npt.NDArray[np.str_] | None = None,
    source: str = "part",
) -> npt.NDArray[np.str_]:
    """The part (n,) of each item; every patient's items are in one part.

    Parts that somebody gave are kept. Where nobody is given to testing, patients without a part are dealt to it whose
    items come nearest to a share of all; then, where nobody is given to validation, patients of what is left, given to
    training or not, nearest to a share of what is not tested on, and that is said where some were given. The others are
    for training.

    Args:
        patients: (n,).
        given: (n,) "training", "validation", "testing", or empty where nobody says.
        shares: of what is not tested on, for validation; of all, for testing.
        seed: shuffles the patients.
        strata: (n,) dealt one by one, so that each part has its share of each; None for one.
        source: what messages say gives the parts, such as a table and its column.

    Raises:
        DatasetError: a patient in two parts, or a part that no patient is left for; the message names source and
            patient or part.
        ConfigError: a share out of its range.

    Example:
        >>> deal_parts(np.array(["a", "a", "b", "c"]), np.array([""] * 4), (0.2, 0.2), seed=0).tolist()
        ['validation', 'validation', 'training', 'testing']
    """
    for name, share in zip(("validation_share", "test_share"), shares, strict=True):
        check_number(name, share, "(0, 1)")
    names, counts = np.unique(np.unique(np.stack([patients, given]), axis=1)[0], return_counts=True)
    for patient in names[counts > 1]:
        named = " and in ".join(part or "no part" for part in np.unique(given[patients == patient]).tolist())
        raise DatasetError(f"{source}: patient '{patient}' is in {named}; give all of a patient's items one part")
    parts = np.where(given == "", "training", given).astype("<U10")
    wanted = [
        (part, share)
        for part, share in (("testing", shares[1]), ("validation", shares[0]))
        if not (given == part).any()
    ]
    for rows in _by_stratum(strata, len(patients)):
        for number, (part, share) in enumerate(wanted):
            # Nobody tests on what was given to training; to validate on some of it is usual.
            free = np.flatnonzero((parts == "training") & rows & ((given == "") | (part != "testing")))
            names, held = _shuffled(patients[free], seed)
            given_to_training = np.unique(patients[(given == "training") & rows & (part == "testing")])
            # One for each part that is still to come, and one to train on, where these are not there already.
            left_for_others = max(0, len(wanted) - number - len(given_to_training))
            nearest = int(np.abs(held - share * len(free)).argmin()) + 1 if len(free) else 0
            parts[free[np.isin(patients[free], names[: min(nearest, len(names) - left_for_others)])]] = part
    for part in PARTS:
        if not (parts == part).any():
            raise DatasetError(f"{source}: {_why_empty(part, patients, given)}")
    taken = (given == "training") & (parts == "validation")
    if taken.any():
        people = len(np.unique(patients[taken])), len(np.unique(patients[given == "training"]))
        logger.warning(
            "%s: nobody is given to validation; %d of the %d patients given to training are taken for it",
            source,
            *people,
        )
    return parts


def _why_empty(part: str, patients: npt.NDArray[np.str_], given: npt.NDArray[np.str_]) -> str:
    """Whether those who gave parts left nobody for this one, or there are too few patients for anybody's parts."""
    count, taken = len(np.unique(patients)), np.isin(given, ("validation", "testing"))
    trained = len(np.unique(patients[given == "training"]))
    if part == "testing" and trained:
        return (
            f"{trained} of {count} patients are given to training, none is left for testing; give some to testing, or "
            "empty the column to have patients dealt"
        )
    if not taken.any():
        return f"{count} patients are too few for three parts, none is left for {part}; add some, or give each a part"
    named, held = " and ".join(np.unique(given[taken]).tolist()), len(np.unique(patients[taken]))
    return f"{held} of {count} patients are given to {named}, none is left for {part}; give some to {part}"


def fraction_of(
    patients: npt.NDArray[np.str_], fraction: float, seed: int, strata: npt.NDArray[np.str_] | None = None
) -> npt.NDArray[np.bool_]:
    """Which items (n,) are learnt from: whole patients, drawn by the seed until they hold their fraction of the items.

    At least one patient of each stratum; those of a smaller fraction are among those of a larger one.

    Args:
        patients: (n,) of the training items.
        fraction: above 0, up to 1.
        seed: draws the patients.
        strata: (n,) drawn one by one, see `deal_parts`.

    Raises:
        ConfigError: the fraction is out of its range.
    """
    check_number("label_fraction", fraction, "(0, 1]", hint="1 takes all training masks")
    chosen = np.zeros(len(patients), bool)
    for rows in _by_stratum(strata, len(patients)):
        names, held = _shuffled(patients[rows], seed)
        enough = int(np.searchsorted(held, fraction * np.count_nonzero(rows) - 1e-9)) + 1
        chosen |= rows & np.isin(patients, names[:enough])
    return chosen


def _by_stratum(strata: npt.NDArray[np.str_] | None, items: int) -> list[npt.NDArray[np.bool_]]:
    """The rows (n,) of each stratum."""
    return [np.ones(items, bool)] if strata is None else [strata == stratum for stratum in np.unique(strata)]


def _shuffled(patients: npt.NDArray[np.str_], seed: int) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.int64]]:
    """Patients in the seed's order, and how many of the items (n,) they have, each with those before it."""
    names, sizes = np.unique(patients, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    return names[order], np.cumsum(sizes[order])
