"""ARES-Lightning: train image classifiers that withstand adversarial examples, and measure how robust they are."""
