"""AlexNet's errors, the units in which corruption errors are measured."""

from __future__ import annotations

CLEAN_ERROR = 0.435
"""On the validation images of ImageNet (as the file named below has it)."""

ON_IMAGENET_C = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
    "speckle_noise": 0.845388,
    "gaussian_blur": 0.787108,
    "spatter": 0.717512,
    "saturate": 0.658248,
}
"""Mean over the five severities of ImageNet-C, 50,000 images each:
experiments/baseline_data/mCE_baseline_imagenet.p of github.com/facebookresearch/augmentation-corruption, the first
fifteen also those of Hendrycks & Dietterich 2019."""

ON_IMAGENET_3DCC = {
    "near_focus": 0.61068,
    "far_focus": 0.65152,
    "bit_error": 0.68336,
    "color_quant": 0.59620,
    "flash": 0.80124,
    "fog_3d": 0.77356,
    "h265_abr": 0.56740,
    "h265_crf": 0.52520,
    "iso_noise": 0.93152,
    "low_light": 0.82248,
    "xy_motion_blur": 0.82484,
    "z_motion_blur": 0.79588,
}
"""The same on ImageNet-3DCC, on the 5,000 images of RobustBench: model_info/imagenet/corruptions/
unaggregated_results_3d.csv, March 2025."""
