"""Train a classifier and evaluate its robustness: `python train.py model=vit_b adv=pgd`."""

from ares_lightning.launch import train_main

if __name__ == "__main__":
    train_main()
