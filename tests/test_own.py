"""`_target_`: a user's own classes in the config, built where ours are, and mistakes in one line."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from PIL import Image
from processes import assert_one_line, here
from torch.utils.data import Dataset

from ares_lightning import build
from ares_lightning.attacks import Attack, make_attack
from ares_lightning.build.budgets import build_attack
from ares_lightning.build.own import build_own, own_class
from ares_lightning.data import ImageError, OwnSets, RobustDataModule
from ares_lightning.evaluation.fingerprints import model_fingerprint, set_fingerprint, source_fingerprint
from ares_lightning.launch import CONFIG_DIR
from ares_lightning.training.objectives import Objective

MINE = """
    from dataclasses import dataclass
    import lightning as L
    import torch
    from torch import nn
    from torch.utils.data import Dataset, IterableDataset
    from PIL import Image
    from ares_lightning.attacks import Attack
    from ares_lightning.attacks.pgd import PGD
    from ares_lightning.evaluation.evaluators import AttackEvaluator, Evaluator
    from ares_lightning.training.objectives import Objective

    @dataclass(frozen=True, kw_only=True)
    class Shift(Attack):
        length: float = 1.0

        def __post_init__(self):
            super().__post_init__()
            if self.length < 0:
                raise ValueError("length must not be negative")

        def _run(self, search):
            search.finish((search.clean + self.length * search.eps[:, None, None, None]).float())

    @dataclass(frozen=True, kw_only=True)
    class Brightness(Shift):
        pass

    class Bare(PGD):
        pass

    class Unwritten(Attack):
        pass

    @dataclass(frozen=True)
    class Asked(AttackEvaluator):
        times: int = 1

    class Twice(Objective):
        def __init__(self, threat, factor):
            self.threat, self.factor = threat, factor

        def loss(self, net, images, adversarial, labels, step):
            return self.factor * nn.functional.cross_entropy(net(images), labels), {}

    class Net(nn.Module):
        def __init__(self, in_chans, num_classes, wrong=0):
            super().__init__()
            self.head = nn.Linear(in_chans, num_classes + wrong)

        def forward(self, images):
            return self.head(images.mean((2, 3)))

    class Pictures(Dataset):
        targets = [0, 1, 2]

        def __init__(self, size=8, shift=0, kind="picture"):
            self.size, self.shift, self.kind = size, shift, kind

        def __len__(self):
            return 3

        def __getitem__(self, i):
            image = torch.zeros(1) if self.kind == "tensor" else Image.new("L", (self.size, self.size), i)
            label = self.targets[i] + self.shift
            return {"image": image, "label": label} if self.kind == "dict" else (image, label)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """A folder of a user, with their modules."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mine_own.py").write_text(textwrap.dedent(MINE))
    (folder / "mine_broken.py").write_text("nothing = undefined\n")
    (folder / "mine_unread.py").write_text("class Mine(:\n")
    (folder / "mine_lacking.py").write_text("import a_module_that_is_not_there\n")
    return folder


@pytest.fixture(autouse=True)
def _where_the_user_works(mine, monkeypatch):
    monkeypatch.chdir(mine)
    monkeypatch.setattr(sys, "path", sys.path.copy())


def composed(program: str, *overrides: str):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(program, list(overrides))


def attack_of(*overrides: str):
    cfg = composed("evaluate", *overrides)
    (evaluator,) = build.build_evaluators(cfg, None, None)
    return evaluator.attack


def asked(*settings: str) -> str:
    return f"+eval.mine={{type: attack, attack: {{_target_: mine_own.{', '.join(settings)}}}}}"


def test_an_own_attack_is_at_the_threat_model_unless_it_says_otherwise():
    attack = attack_of("eval=[]", asked("Brightness"), "threat.norm=l2", "threat.eps=0.5")
    assert (attack.norm, attack.eps, attack.name) == ("l2", 0.5, "brightness")
    attack = attack_of("eval=[]", asked("Brightness", "norm: l1", "eps: 3/4", "length: 0.5"))
    assert (attack.norm, attack.eps, attack.length) == ("l1", 0.75, 0.5)


def test_an_own_evaluator_has_its_attack_built():
    ours = "+eval.mine={_target_: mine_own.Asked, times: 2, attack: {name: pgd, eps: 0.2, steps: 3}}"
    (evaluator,) = build.build_evaluators(composed("evaluate", "eval=[]", ours, "subset=first:3"), None, None)
    assert (evaluator.name, evaluator.times, evaluator.subset) == ("mine", 2, "first:3")
    assert evaluator.attack == make_attack("pgd", eps=0.2, steps=3)


def test_an_own_attack_trains():
    cfg = composed("train")
    attack = {"_target_": "mine_own.Brightness", "length": 0.5}
    cfg.adv = {"name": "pgd", "attack": attack, "norm": "linf", "eps": 0.2, "val_steps": 1}
    objective = build.build_objective(cfg, None, 10)
    assert (objective.inner.attack.length, objective.inner.attack.eps) == (0.5, 0.2)


def test_an_own_objective_takes_the_threat_model():
    cfg = composed("train")
    cfg.adv = {"_target_": "mine_own.Twice", "name": "twice", "factor": 2.0, "norm": "l2", "eps": 0.3}
    objective = build.build_objective(cfg, None, 10)
    assert (objective.threat.norm, objective.threat.eps, objective.factor) == ("l2", 0.3, 2.0)


def test_classes_of_libraries_serve_too(tmp_path):
    for split in ("train", "test"):
        for i in range(6):
            path = tmp_path / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 40 * i).save(path)
    node = "{{_target_: torchvision.datasets.ImageFolder, root: {}}}"
    sets = [f"+data.{split}={node.format(tmp_path / split)}" for split in ("train", "test")]
    cfg = composed("train", "data.name=letters", *sets, "data.num_classes=null", "data.num_val=2")
    data = build.build_data(cfg, training=True)
    assert (data.classes, len(data.train_set), len(data.val_set)) == (("a", "b"), 4, 2)
    assert data.test_set.labels.tolist() == [0, 0, 0, 1, 1, 1]
    monitor = "+trick.monitor._target_=lightning.pytorch.callbacks.DeviceStatsMonitor"
    trainer = build.build_trainer(composed("train", monitor), tmp_path)
    assert "DeviceStatsMonitor" in {type(callback).__name__ for callback in trainer.callbacks}


def test_training_images_of_any_size_are_prepared_or_cut_out():
    own = "{_target_: mine_own.Pictures, size: 20}"
    sets = [f"+data.train={own}", f"+data.test={own}", "data.num_classes=null", "data.num_val=1"]
    for augment in ("none", "shift_and_flip", "resized_crop_and_flip"):
        cfg = composed("train", *sets, "data.preprocess=ares", f"+data.augment={augment}")
        data = build.build_data(cfg, training=True)
        (images, *_), *_ = data.train_dataloader()
        assert images.shape == (2, 1, 8, 8)
        assert sorted(data.test_set.labels.tolist()) == [0, 1, 2]


def test_what_an_own_model_lacks_in_the_config_is_the_groups():
    cfg = composed("train", "model=timm", "+model._target_=mine_own.Net", "model.name=net")
    assert build.build_classifier(cfg, 10).backbone.head.weight.shape == (10, 1)


def written(name: str, text: str) -> type[Any]:
    """The class Mine of a module that is written anew."""
    Path(f"{name}.py").write_text(textwrap.dedent(text))
    sys.modules.pop(name, None)
    return own_class(f"{name}.Mine", object)


def test_classes_that_differ_in_their_code_share_no_fingerprint():
    attack = """
        from dataclasses import dataclass
        from ares_lightning.attacks.pgd import PGD
        @dataclass(frozen=True, kw_only=True)
        class Mine(PGD):
            name = "pgd"
            def _run(self, search):
                search.finish(search.clean{})
    """
    cases = [("mine_first", ""), ("mine_second", ""), ("mine_first", " * 1"), ("mine_first", "")]
    first, elsewhere, edited, again = (written(name, attack.format(end))().fingerprint for name, end in cases)
    assert len({first, edited, make_attack("pgd").fingerprint}) == 3
    assert elsewhere == first, "the same code, wherever it stands"
    assert again == first
    evaluator = """
        from dataclasses import dataclass
        from ares_lightning.evaluation.evaluators import CleanEvaluator
        @dataclass(frozen=True)
        class Mine(CleanEvaluator):
            answer = {}
    """
    one, other = (written("mine_asked", evaluator.format(n))("a").fingerprint(0, "fp32") for n in (1, 2))
    assert one != other
    network = """
        from torch import nn
        class Mine(nn.Flatten):
            def forward(self, images):
                return {} * super().forward(images)
    """
    one, other = (model_fingerprint(written("mine_net", network.format(n))()) for n in (1, 2))
    assert one != other


def test_data_sets_that_differ_in_code_or_settings_share_no_verdicts(tmp_path):
    """Though labels, names and the first image are the same."""
    text = """
        import numpy as np
        from PIL import Image
        from torch.utils.data import Dataset
        class Mine(Dataset):
            targets = [0, 1, 2, 3]
            def __init__(self, root, grey):
                self.grey = grey
            def __len__(self):
                return 4
            def __getitem__(self, i):
                return Image.fromarray(np.full((8, 8), i * (self.grey + {}), np.uint8)), i
    """
    (tmp_path / "file").write_text("one")
    (tmp_path / "other").write_text("two")

    def fingerprints(root: str, grey: int, code: int) -> tuple[str, str]:
        node = {"_target_": "mine_images.Mine", "root": str(tmp_path / root), "grey": grey}
        dataset = written("mine_images", text.format(code))(node["root"], grey)
        sizes = {
            "img_size": 8,
            "in_chans": 1,
            "batch_size": 2,
            "eval_batch_size": 2,
            "num_workers": 0,
            "num_val": 1,
        }
        own = OwnSets(test=dataset, settings={"test": node})
        test = RobustDataModule(name="mine", training=False, own=own, **sizes).test_set
        return source_fingerprint(test), set_fingerprint(test)

    asked = [("file", 5, 0), ("file", 6, 0), ("file", 5, 1), ("other", 5, 0)]
    for different in zip(*(fingerprints(*each) for each in asked), strict=True):
        assert len(set(different)) == len(asked)
    (tmp_path / "moved").write_text("one")
    assert fingerprints("moved", 5, 0) == fingerprints("file", 5, 0)


def test_an_own_attack_does_not_bear_the_name_of_one_of_ours():
    settings = {"_target_": "mine_own.Shift", "eps": 0.1}
    assert build_attack(settings).name == "shift"
    renamed = """
        from dataclasses import dataclass
        from ares_lightning.attacks.pgd import PGD
        @dataclass(frozen=True, kw_only=True)
        class Mine(PGD):
            name = "autoattack"
    """
    written("mine_autoattack", renamed)
    with pytest.raises(ValueError, match=r"_target_=mine_autoattack\.Mine: is called autoattack as one of this"):
        build_attack({"_target_": "mine_autoattack.Mine"})


def test_two_own_attacks_in_one_evaluation_do_not_bear_one_name():
    same = """
        from dataclasses import dataclass
        import mine_own
        @dataclass(frozen=True, kw_only=True)
        class Mine(mine_own.Shift):
            name = "brightness"
    """
    written("mine_same", same)
    others = "+eval.other={type: attack, attack: {_target_: mine_same.Mine}}"
    with pytest.raises(build.ConfigError, match=r"^eval\.other\.attack: mine_own\..* both called brightness; set"):
        build.build_evaluators(composed("evaluate", "eval=[]", asked("Brightness"), others), None, None)


def test_an_attack_that_leaves_its_budget_or_the_box_is_refused():
    def brighter_than(threshold: float):
        means = torch.tensor([[-1.0, 1.0]])
        return lambda images: (images.mean((1, 2, 3)) - threshold)[:, None] * means

    shift = own_class("mine_own.Shift", Attack)
    dark, bright, label = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.95), torch.tensor([0])
    assert shift(eps=0.1)(brighter_than(0.05), dark, label).broken.all()
    for attack, images in ((shift(eps=0.1, length=1.1), dark), (shift(eps=0.1), bright)):
        with pytest.raises(ValueError, match=r"shift: hands in examples outside of the budget or of \[0, 1\]"):
            attack(brighter_than(float(images.mean()) + 0.01), images, label)


MISTAKES = [
    (
        Attack,
        {"_target_": "mine_own.Brightnes"},
        r"_target_=mine_own\.Brightnes: mine_own \(.*\) has no class",
    ),
    (Attack, {"_target_": "mine_own.Net"}, r"_target_=mine_own\.Net: is no subclass of ares_lightning\.attacks\."),
    (
        Attack,
        {"_target_": "mine_own.Bare"},
        r"is no dataclass; put @dataclass\(frozen=True, kw_only=True\)",
    ),
    (Attack, {"_target_": "mine_own.Unwritten"}, r"_target_=mine_own\.Unwritten: lacks _run; write what"),
    (Attack, {"_target_": "mine_own.Brightness", "lenth": 1}, r"lenth=1: mine_own\.Brightness .* mean length\?"),
    (Attack, {"_target_": "mine_own.Brightness", "norm": "l0"}, r"norm=l0: brightness knows linf, l2, l1"),
    (
        Attack,
        {"_target_": "mine_own.Shift", "length": -1},
        r"_target_=mine_own\.Shift: ValueError: length must",
    ),
    (Objective, {"_target_": "mine_own.Twice", "threat": None}, r"factor: must be given; mine_own\.Twice needs it"),
    (Callback, {"_target_": "os.system"}, r"_target_=os\.system: os \(.*\) has no class system"),
    (Callback, {"_target_": "subprocess.Popen"}, r"_target_=subprocess\.Popen: is no subclass of lightning\."),
    (Callback, {"_target_": "Mine"}, r"_target_=Mine: expected <module>\.<Class>, such as mine\.Mine"),
    (Callback, {"_target_": None}, r"_target_=None: expected <module>\.<Class>"),
    (Callback, {"_target_": "nowhere.Mine"}, r"there is no module nowhere in /.*; run where its file lies"),
    (
        Callback,
        {"_target_": "mine_broken.Mine"},
        r"fails in .*broken\.py, line 1: NameError: .*; mend it",
    ),
    (
        Callback,
        {"_target_": "mine_lacking.Mine"},
        r"fails in .*: ModuleNotFoundError: No module",
    ),
    (
        Callback,
        {"_target_": "mine_unread.Mine"},
        r"fails: SyntaxError: .*mine_unread\.py, line 1",
    ),
    (Dataset, {"_target_": "torchvision.datasets.MNIST", "root": "."}, r"\.MNIST: RuntimeError: Dataset not found"),
]


@pytest.mark.parametrize(("base", "settings", "message"), MISTAKES, ids=lambda value: str(value)[:50])
def test_a_mistake_names_its_key_and_the_remedy(base, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        build_own(settings, base)
    assert "\n" not in str(error.value)


PICTURES = "{_target_: mine_own.Pictures}"
OWN_DATA = [f"+data.test={PICTURES}", "data.num_classes=null", "data.num_val=1"]
LINES = [
    (["+eval.mine._target_=mine_own.Ask"], r"eval\.mine\._target_=mine_own\.Ask: .* did you mean Asked\?"),
    (["eval=[attack]", "+attack._target_=mine_own.Brightness"], r"attack\.name=pgd: mine_own\.Brightness takes no"),
    (["+adv._target_=mine_own.Thrice"], r"adv\._target_=mine_own\.Thrice: .* did you mean Twice\?"),
    (
        ["model=timm", "model.name=net", "+model._target_=mine_own.Net", "+model.settings.wrong=1"],
        r"shape \[2, 11\]",
    ),
    (["+trick.mine._target_=mine_own.Net"], r"trick\.mine\._target_=mine_own\.Net: is no subclass of lightning"),
    ([f"+data.train={PICTURES}", "+data.test=null"], r"data\.test=None: expected the settings of a dataset"),
]


@pytest.mark.parametrize(("overrides", "message"), LINES, ids=lambda value: str(value)[:50])
def test_the_programs_say_so_in_one_line(overrides, message, tmp_path):
    assert_one_line(here("train.py", *overrides, f"launch.root={tmp_path}"), message)
    assert not list(tmp_path.iterdir())


STRANGE_DATA = [
    ("shift: 1", r"data\.train: sample \d has label \d, in the list of all labels \d; mend one of them"),
    ("size: 9", r"data\.train: sample \d is 9x9 pixels where data\.img_size=8; data\.preprocess=ares resizes"),
    ("kind: tensor", r"data\.train: sample \d is a Tensor; give PIL images"),
    ("kind: dict", r"data\.train: sample \d is a dict of 2; have Pictures return \(image, label\)"),
    ("most: 5", r"data\.train\.most=5: mine_own\.Pictures takes no such argument"),
]


@pytest.mark.parametrize(("setting", "message"), STRANGE_DATA)
def test_data_that_are_not_as_they_should_be_are_named(setting, message):
    cfg = composed("train", *OWN_DATA, f"+data.train={{_target_: mine_own.Pictures, {setting}}}")
    with pytest.raises((build.ConfigError, ImageError), match=message):
        build.build_data(cfg, training=True)


def test_a_data_set_without_a_length_and_an_unknown_augmentation_are_refused():
    cfg = composed("evaluate", "+data.test._target_=mine_own.Stream")
    with pytest.raises(build.ConfigError, match=r"data\.test: Stream has no length; give a map-style dataset"):
        build.build_data(cfg, training=False)
    cfg = composed("evaluate", f"+data.test={PICTURES}", "+data.augment=flip")
    with pytest.raises(build.ConfigError, match=r"data\.augment=flip: expected one of none, shift_and_flip"):
        build.build_data(cfg, training=False)
