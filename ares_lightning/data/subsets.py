"""Which samples of a set are taken: by number, by chance, or by a list."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path, PurePosixPath

import torch

from ares_lightning.data.datasets import ImageSet
from ares_lightning.data.keyed import keyed_permutation
from ares_lightning.data.sources import FileSource, abridged

ARES_IMAGES = 1000
"""ARES-Bench attacks 1,000 images drawn at random from the validation set (README of ARES 2.0)."""
ROBUSTBENCH_IMAGES = 5000
ROBUSTBENCH_LIST = "imagenet_test_image_ids.txt"
"""The list of RobustBench (helper_files/), which has the lines `<wnid>/ILSVRC2012_val_<number>.JPEG`."""
FORMS = "null (all), first:n, random:n@seed, file:<list>, ares1k, ares1k@seed or robustbench5k"

_FORM = re.compile(
    r"first:(?P<first>\d+)|random:(?P<random>\d+)@(?P<seed>\d+)|file:(?P<file>.+)"
    r"|(?P<ares>ares1k)(@(?P<ares_seed>\d+))?|(?P<robustbench>robustbench5k)"
)


def select_subset(dataset: ImageSet, spec: str | None) -> ImageSet:
    """Take the part of a set that `subset=…` names; the sample ids stay what they were.

    `None` is all of it; `first:n` the first n in canonical order; `random:n@seed` n drawn without replacement, in
    canonical order, of which a larger n with the same seed keeps those of a smaller one; `ares1k` is
    `random:1000@0`, `ares1k@seed` with another seed; `file:<list>` the images whose paths, or names alone, stand at
    the beginning of the list's lines; `robustbench5k` those of RobustBench's list, which lies in the data's root or
    comes with an installed RobustBench.

    Raises ValueError naming the value and the remedy.
    """
    if spec is None:
        return dataset
    form = _FORM.fullmatch(spec)
    known_forms = f"must be {FORMS}, with n from 1 to {len(dataset)}, the number of images"
    if form is None:
        raise ValueError(f"subset={spec}: {known_forms}")
    if form["file"]:
        return _listed(dataset, spec, Path(form["file"]).expanduser())
    if form["robustbench"]:
        chosen = _listed(dataset, spec, _robustbench_list(dataset, spec))
        if len(chosen) != ROBUSTBENCH_IMAGES:
            raise ValueError(f"subset={spec}: the list has {len(chosen)} images; expected {ROBUSTBENCH_IMAGES}")
        return chosen
    count = _count(form)
    if not 0 < count <= len(dataset):
        raise ValueError(f"subset={spec}: {known_forms}")
    if form["first"]:
        return dataset.take(range(count))
    seed = int(form["seed"] or form["ares_seed"] or 0)
    return dataset.take(keyed_permutation(len(dataset), "subset", seed)[:count].sort().values)


def asks_for_more(dataset: ImageSet, spec: str | None) -> bool:
    """Whether `first:n`, `random:n@seed` or `ares1k` asks for more images than there are; other forms never do."""
    form = _FORM.fullmatch(str(spec))
    return form is not None and not (form["file"] or form["robustbench"]) and _count(form) > len(dataset)


def _count(form: re.Match[str]) -> int:
    return ARES_IMAGES if form["ares"] else int(form["first"] or form["random"])


def subset_hash(dataset: ImageSet) -> str:
    """Return a hash of which images a set has, by their names in order: equal where the same images are asked."""
    names = "\n".join(dataset.sample_name(sample_id) for sample_id in dataset.sample_ids.tolist())
    return hashlib.blake2b(names.encode(), digest_size=8).hexdigest()


def _robustbench_list(dataset: ImageSet, spec: str) -> Path:
    places = [dataset.source.root / ROBUSTBENCH_LIST] if isinstance(dataset.source, FileSource) else []
    package = importlib.util.find_spec("robustbench")
    if package is not None and package.submodule_search_locations:
        places += [Path(package.submodule_search_locations[0]) / "helper_files" / ROBUSTBENCH_LIST]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(
            f"subset={spec}: RobustBench's list {ROBUSTBENCH_LIST} is not in data.root; put it there, install "
            "robustbench, or give subset=file:<list>"
        )
    return found


def _listed(dataset: ImageSet, spec: str, path: Path) -> ImageSet:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"subset={spec}: {path} is no readable list of images, one a line") from error
    wanted = [line.split()[0].removeprefix("./") for line in lines if line.strip()]
    positions: dict[str, list[int]] = {}
    for position, sample_id in enumerate(dataset.sample_ids.tolist()):
        parts = PurePosixPath(dataset.sample_name(sample_id)).parts
        for start in range(len(parts)):
            positions.setdefault("/".join(parts[start:]), []).append(position)
    found, missing = set(), []
    for name in wanted:
        hits = positions.get(name) or positions.get(PurePosixPath(name).name) or []
        if len(hits) > 1:
            raise ValueError(
                f"subset={spec}: {name} is the name of {len(hits)} images; give the path below data.root"
            )
        found.update(hits)
        missing += [] if hits else [name]
    if missing or not wanted:
        raise ValueError(
            f"subset={spec}: {len(missing)} of the {len(wanted)} images of the list are not in {dataset.name}: "
            f"{abridged(missing)}"
        )
    return dataset.take(torch.tensor(sorted(found)))
