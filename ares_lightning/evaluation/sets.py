"""Which other sets a classifier is asked about: published ones that are found, or corruptions made on the fly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ares_lightning.data import (
    VARIANTS,
    Corruption,
    ImageSet,
    RobustDataModule,
    Wishes,
    load_variant,
    select_subset,
)
from ares_lightning.data.corruptions import COMMON, EXTRA, SEVERITIES, corruptions_for
from ares_lightning.data.variants import Variant, cells, find_variant


class NothingFoundError(ValueError):
    """Nothing is there that an evaluator could be asked with; a suite does without it."""


class FoundSets(NamedTuple):
    """The sets to ask about, the undisturbed test images first; keys of those that were looked for in vain."""

    sets: tuple[ImageSet, ...]
    not_found: tuple[str, ...]


def corrupted_sets(data: RobustDataModule, dataset: ImageSet, names: Any, severities: Sequence[int]) -> FoundSets:
    """Return the test images `dataset` under corruptions made on the fly, keyed by the seed of `data`.

    names: of corruptions; None for those that make sense at this size, `all` for the common and the extra ones.
    Raises ValueError for an unknown name or severity.
    """
    if names is None:
        names = corruptions_for(data.wishes.img_size)
    elif names == "all":
        names = COMMON + EXTRA
    if not isinstance(names, list | tuple) or not names:
        raise ValueError(f"names={names}: expected null, all, or a list such as [fog,snow]")
    unknown = [name for name in names if name not in COMMON + EXTRA]
    if unknown:
        raise ValueError(f"names={unknown[0]}: expected some of {', '.join(COMMON + EXTRA)}")
    seed, chosen = data.wishes.seed, _checked(severities)
    made = [dataset.corrupted(Corruption(name, s, seed)) for name in dict.fromkeys(names) for s in chosen]
    return FoundSets((dataset, *made), ())


def published_sets(
    data: RobustDataModule,
    dataset: ImageSet,
    root: str | None,
    sets: Sequence[str] | None,
    subset: str | None,
    severities: Sequence[int],
    paths: Mapping[str, str | None],
) -> FoundSets:
    """Return the out-of-distribution sets of VARIANTS that suit the network of `data` and are found.

    root: the folder in which they lie under their published names; those made of validation images are found where
    `data` is. sets: their keys, None for all. subset: of each. paths: folders of single sets.
    Raises ValueError for an unknown key, for a root that is no folder, for a path that does not hold its set, for a
    set that is asked for by its key and not there; NothingFoundError where nothing is found.
    """
    known = [key for key, variant in VARIANTS.items() if variant.network == data.network]
    if not known:
        networks = sorted({variant.network for variant in VARIANTS.values()})
        raise NothingFoundError(
            f"sets={sets}: no out-of-distribution sets are known for data.name={data.network}; there are some for "
            f"{', '.join(networks)}"
        )
    if not isinstance(sets, list | tuple | None):
        raise ValueError(f"sets={sets}: expected null, or a list such as [imagenet_a,imagenet_r]")
    given = {key: path for key, path in paths.items() if path is not None}
    for key in [*(sets or ()), *given]:
        if key not in known:
            raise ValueError(f"sets={key}: is no set for {data.network}; expected some of {', '.join(known)}")
    unasked = [key for key in given if sets is not None and key not in sets]
    if unasked:
        raise ValueError(f"paths.{unasked[0]}={given[unasked[0]]}: is not among sets={sets}; add it there")
    if root is not None and not Path(root).expanduser().is_dir():
        raise ValueError(f"root={root}: is no folder; give the one that holds the sets")
    chosen = _checked(severities)
    wishes = replace(data.wishes, corruption=None, severity=None)
    found: list[ImageSet] = []
    not_found: list[str] = []
    asked = list(dict.fromkeys(sets or known))
    for key in asked:
        variant = VARIANTS[key]
        of_validation = data.root if variant.is_of_validation and dataset.name == data.network else None
        folder = _folder(variant, of_validation, root, given.get(key))
        cells_of = [] if folder is None else _all_cells(variant, folder, wishes, chosen)
        there = [each for each in cells_of if len(each)]
        if not there:
            not_found.append(key)
        found += [each for each in there if each.name != dataset.name]
    if sets is not None and not_found:
        raise ValueError(
            f"sets={not_found[0]}: is not below root={root} under its published name; leave it out, or give "
            f"its path as paths.{not_found[0]}"
        )
    if len(not_found) == len(asked):
        raise NothingFoundError(
            f"root={root}: none of {', '.join(not_found)} is there under its published name; give the folder that "
            "holds them, or the path of one as paths.<set>"
        )
    return FoundSets((dataset, *(select_subset(each, subset) for each in found)), tuple(not_found))


def _checked(severities: Any) -> list[int]:
    """Return the severities, each once; raise ValueError for what is no list of some of them."""
    if not isinstance(severities, list | tuple) or not severities or not set(severities) <= set(SEVERITIES):
        raise ValueError(f"severities={severities}: expected a list of some of 1 to 5")
    return list(dict.fromkeys(severities))


def _folder(variant: Variant, here: Path | None, root: str | None, path: str | None) -> Path | None:
    if path is not None:
        folder = find_variant(variant, Path(path).expanduser())
        if folder is None:
            raise ValueError(f"paths.{variant.key}={path}: {variant.title} is not there; it needs {variant.words}")
        return folder
    if here is not None:
        return find_variant(variant, here)
    return None if root is None else find_variant(variant, Path(root).expanduser(), itself=False)


def _all_cells(variant: Variant, folder: Path, wishes: Wishes, severities: Sequence[int]) -> list[ImageSet]:
    if not variant.corruptions:
        return [load_variant(variant, folder, wishes)]
    return [
        load_variant(variant, folder, replace(wishes, corruption=cell.corruption, severity=cell.severity))
        for cell in cells(variant, folder)
        if cell.severity in severities
    ]
