"""Evaluate the robustness of a checkpoint: `python evaluate.py ckpt=runs/<name>/<run id>`."""

from ares_lightning.launch import evaluate_main

if __name__ == "__main__":
    evaluate_main()
