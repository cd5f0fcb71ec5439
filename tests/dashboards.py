"""What a run has logged to Weights & Biases, read back from the file that `wandb sync` reads."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import wandb_records
from wandb.proto.wandb_internal_pb2 import MetricRecord, Record


@dataclass
class WandbLog:
    """The records of one run, of all times that it was taken up.

    artifacts: (type, name, files, aliases); charts: the settings of charts by their names.
    """

    folders: list[Path]
    ids: set[str] = field(default_factory=set)
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, MetricRecord] = field(default_factory=dict)
    charts: dict[str, Any] = field(default_factory=dict)
    artifacts: list[tuple[str, str, list[str], list[str]]] = field(default_factory=list)
    stored: dict[str, Path] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        return {key for row in self.history for key in row}

    def media(self, key: str) -> Path:
        """The file of a table or page."""
        (row,) = [row for row in self.history if key in row]
        return self._found(row[key]["path"])

    def images(self, key: str) -> list[tuple[Path, str]]:
        (row,) = [row for row in self.history if key in row]
        return list(zip(map(self._found, row[key]["filenames"]), row[key]["captions"], strict=True))

    def table(self, key: str) -> list[dict[str, Any]]:
        content = json.loads(self.media(key).read_text())
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]

    def lines(self, key: str) -> dict[str, list[tuple[float, float]]]:
        """The lines of a chart by label."""
        assert self.charts[key]["panelDefId"] == "wandb/lineseries/v0"
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in self.table(f"Custom Chart Tables/{key}_table"):
            lines.setdefault(row["lineKey"], []).append((row["step"], row["lineVal"]))
        return lines

    def _found(self, path: str) -> Path:
        (file,) = [folder / "files" / path for folder in self.folders if (folder / "files" / path).exists()]
        return file


def read_wandb(run_dir: Path) -> WandbLog:
    """Read what lies below `run_dir/wandb`."""
    log = WandbLog(sorted(run_dir.glob("wandb/offline-run-*")))
    for file in (file for folder in log.folders for file in folder.glob("run-*.wandb")):
        for data in wandb_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            _take(log, record)
    return log


def _take(log: WandbLog, record: Record) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        log.ids.add(record.run.run_id)
        log.job_type = record.run.job_type
        _put(log.config, record.run.config.update)
    elif kind == "config":
        _put(log.config, record.config.update)
        log.charts = {
            key: chart["panel_config"] for key, chart in log.config.get("_wandb", {}).get("visualize", {}).items()
        }
    elif kind == "history":
        log.history.append(_put({}, record.history.item))
    elif kind == "summary":
        _put(log.summary, record.summary.update)
    elif kind == "metric":
        log.metrics[record.metric.name or record.metric.glob_name] = record.metric
    elif kind == "artifact" and record.artifact.type != "run_table":
        artifact = record.artifact
        files = {each.path: Path(each.local_path) for each in artifact.manifest.contents}
        log.artifacts.append((artifact.type, artifact.name, sorted(files), sorted(artifact.aliases)))
        log.stored |= files


def _put(into: dict[str, Any], items: Any) -> dict[str, Any]:
    for item in items:
        *above, last = [item.key] if item.key else list(item.nested_key)
        node = into
        for key in above:
            node = node.setdefault(key, {})
        node[last] = json.loads(item.value_json)
    return into
