"""Linear probing, then fine-tuning (Kumar et al. 2022, arXiv 2202.10054): the last layer is trained alone at first.

python train.py --config-dir examples/conf trick=[head_first] model.weights=<checkpoint>
"""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer


class HeadFirst(Callback):
    """Leaves the weights but those of the last layer as they are for the first epochs; batch norms go on counting.

    epochs: how many. Gradients are dropped, not switched off, so that processes stay in step.
    """

    def __init__(self, epochs: int = 1) -> None:
        if type(epochs) is not int or epochs < 1:
            raise ValueError(f"epochs={epochs}: expected a whole number of at least 1")
        self.epochs = epochs

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Drop the gradients that are not to count."""
        if trainer.current_epoch >= self.epochs:
            return
        module: Any = pl_module
        head = {id(parameter) for parameter in module.optim.head(module.net)}
        for parameter in module.net.parameters():
            if id(parameter) not in head:
                parameter.grad = None
