"""How well masks are found: Dice, distances of surfaces, with intervals over patients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from medsd.checks import check_number
from medsd.errors import DatasetError
from medsd.intervals import Interval, bootstrap_groups

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class UnitScores:
    """What was found in one image, slide or volume; arrays have an entry for each class but the background.

    Attributes:
        unit, patient: names.
        true, found, both: pixels of the class in the mask, in the prediction, and in both.
        hausdorff95: 95th percentile of the distances between the surfaces of mask and prediction, MONAI's; nan where
            either has none of the class, or where it was not asked for.
        surface_dice: share of both surfaces that lies within a tolerance of the other, MONAI's; 0 where only one of
            them has the class, nan where neither has.
    """

    unit: str
    patient: str
    true: Counts
    found: Counts
    both: Counts
    hausdorff95: Floats
    surface_dice: Floats

    @property
    def dice(self) -> Floats:
        """Dice of each class; nan where the mask has none of it, whatever was found (MONAI's choice)."""
        whole = np.where(self.true > 0, self.true + self.found, 0)
        dice: Floats = np.divide(2.0 * self.both, whole, out=np.full(len(whole), np.nan), where=whole > 0)
        return dice


@dataclass(frozen=True)
class ClassScores:
    """Scores of a class, or their mean over classes, with 95 % bootstrap intervals over patients.

    Attributes:
        dice: mean over the units whose mask has the class.
        pooled_dice: of all pixels of all units together, so that what is found where nothing is counts, too.
        hausdorff95: mean over the units where mask and prediction both have the class, in `length`s.
        surface_dice: mean over the units where mask or prediction has it.
        units, patients: with the class in the mask; of the mean over classes, with any, as below.
        missed: units with the class in which none of it was found; no distance is known of them.
        false: units without the class in which some was found; `dice` does not see them.
    """

    dice: Interval
    pooled_dice: Interval
    hausdorff95: Interval
    surface_dice: Interval
    units: int
    patients: int
    missed: int
    false: int


def score_unit(
    found: Tensor,
    mask: Tensor,
    classes: int,
    unit: str = "",
    patient: str = "",
    spacing: Sequence[float] | None = None,
    tolerance: float = 2.0,
) -> UnitScores:
    """Compare a prediction with its mask.

    Args:
        found, mask: class numbers, (H, W) or (D, H, W), integers, 0 the background.
        classes: K, with the background.
        unit, patient: names, kept.
        spacing: distance between pixels along each axis, in the lengths that scores shall have; None where the pixels
            are parts of a whole, whose surfaces are not seen: distances are then left out.
        tolerance: of the surface Dice, in the same lengths.

    Raises:
        DatasetError: shapes that differ, or a class number that is not below K.

    Example:
        >>> mask, found = torch.zeros(8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)
        >>> mask[2:6, 2:6], found[2:6, 2:4] = 1, 1
        >>> scores = score_unit(found, mask, classes=2, spacing=(1.0, 1.0))
        >>> scores.dice.round(2).tolist(), scores.hausdorff95.tolist()
        ([0.67], [2.0])
    """
    check_number("surface_tolerance", tolerance, "[0, inf)")
    if found.shape != mask.shape:
        raise DatasetError(f"{unit}: prediction {tuple(found.shape)} beside a mask {tuple(mask.shape)}")
    for name, values in (("prediction", found), ("mask", mask)):
        if int(values.max()) >= classes:
            raise DatasetError(f"{unit}: class {int(values.max())} in the {name}; there are {classes}")
    joined = torch.bincount((mask.long() * classes + found.long()).flatten(), minlength=classes**2)
    table = joined.view(classes, classes).numpy()
    true, predicted, both = table.sum(axis=1)[1:], table.sum(axis=0)[1:], np.diag(table)[1:]
    unknown = np.full(classes - 1, np.nan)
    hausdorff, surface = unknown, unknown
    if spacing is not None:
        hausdorff, surface = _surfaces(found, mask, classes, spacing, tolerance, (true > 0) | (predicted > 0))
        hausdorff = np.where((true > 0) & (predicted > 0), hausdorff, np.nan)
    return UnitScores(unit, patient, true, predicted, both, hausdorff, surface)


def joined_scores(parts: Iterable[UnitScores]) -> UnitScores:
    """The scores of a slide by those of its tiles; distances are not known.

    Raises:
        DatasetError: no parts.
    """
    each = list(parts)
    if not each:
        raise DatasetError("no tiles of a slide to score")
    true, found, both = (np.sum([getattr(part, name) for part in each], axis=0) for name in ("true", "found", "both"))
    unknown = np.full(len(each[0].true), np.nan)
    return UnitScores(each[0].unit, each[0].patient, true, found, both, unknown, unknown)


def summarise_masks(units: Sequence[UnitScores], classes: Sequence[str], seed: int = 0) -> dict[str, ClassScores]:
    """Scores by class, without the background, and under "mean" their mean over classes, each of which counts alike.

    Args:
        units: what was found.
        classes: all names, the background's first.
        seed: of the bootstrap, the same for every score: differences of two runs on the same units are paired.

    Raises:
        DatasetError: no units.
    """
    if not units:
        raise DatasetError("no images with masks to score; check test_share")
    patients = np.array([unit.patient for unit in units])
    true, found, both = (np.array([getattr(unit, name) for unit in units]) for name in ("true", "found", "both"))
    dice, hausdorff, surface = (
        np.array([getattr(unit, name) for unit in units]) for name in ("dice", "hausdorff95", "surface_dice")
    )

    def of_columns(chosen: Sequence[int]) -> ClassScores:
        def mean(values: Floats) -> Interval:
            known = ~np.isnan(values[:, chosen])
            some = known.any(axis=1)
            above = np.where(known, values[:, chosen], 0.0)
            return _mean_of_ratios(above[some], known[some], patients[some], seed)

        there = (true[:, chosen] > 0).any(axis=1)
        return ClassScores(
            dice=mean(dice),
            pooled_dice=_mean_of_ratios(2 * both[:, chosen], (true + found)[:, chosen], patients, seed),
            hausdorff95=mean(hausdorff),
            surface_dice=mean(surface),
            units=int(there.sum()),
            patients=len(np.unique(patients[there])),
            missed=int(((true > 0) & (found == 0))[:, chosen].any(axis=1).sum()),
            false=int(((true == 0) & (found > 0))[:, chosen].any(axis=1).sum()),
        )

    scores = {name: of_columns([number]) for number, name in enumerate(classes[1:])}
    return scores if len(classes) == 2 else {"mean": of_columns(range(len(classes) - 1)), **scores}


def _mean_of_ratios(
    above: npt.NDArray[Any], below: npt.NDArray[Any], patients: npt.NDArray[np.str_], seed: int
) -> Interval:
    """Mean over classes of quotients of sums over units, (units, classes) each; classes of no unit are left out."""

    def statistic(weight: Floats) -> float:
        whole = weight @ below
        each = np.divide(weight @ above, whole, out=np.full(len(whole), np.nan), where=whole > 0)
        return math.nan if np.isnan(each).all() else float(np.nanmean(each))

    return bootstrap_groups(statistic, patients, seed=seed)


def rows_of(units: Iterable[UnitScores], classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row a unit and class for a table."""
    for unit in units:
        for number, name in enumerate(classes[1:]):
            yield {
                "unit": unit.unit,
                "patient": unit.patient,
                "class": name,
                "dice": unit.dice[number],
                "hausdorff95": unit.hausdorff95[number],
                "surface_dice": unit.surface_dice[number],
                "true_px": int(unit.true[number]),
                "found_px": int(unit.found[number]),
                "both_px": int(unit.both[number]),
            }


def dice_per_image(found: Tensor, masks: Tensor, classes: int) -> Floats:
    """Dice (n,) of masks (n, H, W): the mean over the classes that are there; nan of an empty mask.

    Raises:
        DatasetError: a class number that is not below `classes`.

    Example:
        >>> mask = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [0, 0]]], dtype=torch.uint8)
        >>> found = torch.tensor([[[0, 1], [1, 1]], [[0, 0], [0, 1]]], dtype=torch.uint8)
        >>> dice_per_image(found, mask, classes=2).round(3).tolist()
        [0.8, nan]
    """
    each = [score_unit(one, other, classes).dice for one, other in zip(found, masks, strict=True)]
    return np.array([math.nan if np.isnan(dice).all() else float(np.nanmean(dice)) for dice in each])


def _surfaces(
    found: Tensor, mask: Tensor, classes: int, spacing: Sequence[float], tolerance: float, there: npt.NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    """Hausdorff distance and surface Dice of each class that is in mask or prediction, by MONAI."""
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    hausdorff, surface = np.full(classes - 1, np.nan), np.full(classes - 1, np.nan)
    for number in np.flatnonzero(there):
        one, other = (F.one_hot(values.eq(int(number) + 1).long(), 2).movedim(-1, 0)[None] for values in (found, mask))
        if one[:, 1].any() and other[:, 1].any():
            steps = list(spacing)
            hausdorff[number] = compute_hausdorff_distance(one, other, percentile=95, spacing=steps).item()
            surface[number] = compute_surface_dice(one, other, class_thresholds=[tolerance], spacing=steps).item()
        else:
            surface[number] = 0.0
    return hausdorff, surface
