"""The examples that a run kept, as a panel of the page, and the names of its classes."""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from ares_lightning.evaluation.report.rows import NORMS, eps_text
from ares_lightning.evaluation.report.run import Run

_ERRORS = (LookupError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile)


def class_names(run: Run) -> dict[int, str]:
    """Return what the classes are called, empty where the run kept no examples."""
    with _reading(run) as kept:
        return {} if kept is None else dict(enumerate(map(str, kept["classes"].tolist())))


def panel(run: Run, most: int) -> dict[str, Any]:
    """Return the panel of the first `most` examples that a run kept, empty where it kept none."""
    with _reading(run) as kept:
        return {} if kept is None else _panel({key: kept[key] for key in kept.files}, most)


@contextmanager
def _reading(run: Run) -> Iterator[Any]:
    """Open `examples.npz`, None where there is none; name it where something is wrong with it."""
    file = run.folder / "examples.npz"
    try:
        if not file.exists():
            yield None
            return
        with np.load(file, allow_pickle=False) as content:
            yield content
    except _ERRORS as error:
        raise ValueError(f"{file}: is not a readable file of examples ({error})") from error


def _panel(kept: dict[str, Any], most: int) -> dict[str, Any]:
    clean, adversarial = kept["clean"][:most].astype(float), kept["adversarial"][:most].astype(float)
    change = adversarial - clean
    factor = 0.5 / max(float(abs(change).max(initial=0)), 1e-6)
    names = dict(enumerate(kept["classes"].tolist()))
    keys = {"label": "label", "before": "clean_prediction", "after": "adversarial_prediction"}
    cards = []
    for at in range(len(clean)):
        card = {key: int(kept[column][at]) for key, column in keys.items()}
        named = {f"{key}_name": names.get(index, index) for key, index in card.items()}
        images = {"clean": clean[at], "change": 0.5 + factor * change[at], "adversarial": adversarial[at]}
        sources = {key: _image(pixels) for key, pixels in images.items()}
        cards.append({**card, **named, **sources, "sample_name": kept["sample_name"][at]})
    norm, eps = str(kept["norm"]), float(kept["eps"])
    about = f"{kept['attack']}, {NORMS.get(norm, norm)}, eps {eps_text(norm, eps)}"
    about += f"; {len(cards)} of {len(kept['clean'])} kept; perturbation amplified {factor:.3g} times"
    return {"about": about, "factor": f"{factor:.3g}", "small": clean.shape[-1] < 100, "cards": cards}


def _image(pixels: np.ndarray[Any, Any]) -> str:
    """Return the image [C, H, W], clipped to [0, 1], as the source of an <img>."""
    levels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    png = io.BytesIO()
    Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
