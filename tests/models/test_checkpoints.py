"""Checkpoints that are broken, foreign or hostile."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

from ares_lightning.models import CheckpointError, load_network, make_classifier, read_checkpoint


class Hostile:
    """Would leave a file behind if it were ever unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def small_net(num_classes: int = 10):
    return make_classifier("cnn", in_chans=1, num_classes=num_classes, img_size=8, mean=[0], std=[1], width=4)


def checkpoint(net) -> dict:
    return {"config": {"name": "x"}, "state_dict": {f"net.{key}": value for key, value in net.state_dict().items()}}


def test_a_checkpoint_comes_back(tmp_path):
    net, other = small_net(), small_net()
    torch.save(checkpoint(net), tmp_path / "good.ckpt")
    load_network(other, read_checkpoint(tmp_path / "good.ckpt")["state_dict"], tmp_path / "good.ckpt")
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "text", "truncated", "code", "bare pickle", "other content", "tensor"]
)
def test_a_bad_file_is_refused_in_one_line_and_nothing_is_executed(kind, tmp_path):
    path, mark = tmp_path / "bad.ckpt", tmp_path / "executed"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        torch.save(checkpoint(small_net()), path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "code":
        torch.save({**checkpoint(small_net()), "config": Hostile(mark)}, path)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(Hostile(mark)))
    elif kind == "other content":
        torch.save({"optimizer": {}}, path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    with pytest.raises(CheckpointError, match=r"bad\.ckpt: ") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_weights_from_before_batch_norms_counted_their_batches_are_read(tmp_path):
    net, other = small_net(), small_net()
    state = {key: v for key, v in checkpoint(net)["state_dict"].items() if "num_batches_tracked" not in key}
    load_network(other, state, tmp_path)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in net.state_dict().items())


def test_weights_of_another_shape_or_architecture_leave_the_network_alone(tmp_path):
    net = small_net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"head\.weight has shape \[3, 8\], the model has \[10, 8\]"):
        load_network(net, checkpoint(small_net(3))["state_dict"], tmp_path)
    other = make_classifier("resnet18", in_chans=1, num_classes=10, img_size=8, mean=[0], std=[1])
    with pytest.raises(CheckpointError, match="another architecture"):
        load_network(net, checkpoint(other)["state_dict"], tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
