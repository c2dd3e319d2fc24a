"""Install the `sat` package. Extras: train (DeepSpeed), text (T5), video (mp4), convert (comparison
with diffusers), test (what the test suite needs)."""

from pathlib import Path

from setuptools import find_packages, setup

TEXT = ["transformers>=5", "sentencepiece>=0.2", "protobuf>=5"]
VIDEO = ["av>=14"]
TRAIN = ["deepspeed>=0.19"]
DEMO = ["pillow>=10"]
CONVERT = ["diffusers>=0.35", "accelerate>=1"]
TEST = [
    "pytest>=8",
    "pytest-timeout>=2",
    "pytest-xdist>=3",
    "hypothesis>=6",
    "ruff>=0.9",
    "mypy>=1.15",
    "types-PyYAML",
    "types-tqdm",
    "tensorboard>=2",
    "peft>=0.17",
    "triton>=3.4; platform_system == 'Linux'",  # its interpreter; torch for CUDA brings the version that it needs
]

setup(
    name="sat-video",
    version="0.1.0",
    description="Train and sample CogVideoX-class video diffusion transformers, with the same numbers at any layout.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["sat", "sat.*"]),
    install_requires=["torch>=2.8", "numpy>=2", "einops>=0.8", "pyyaml>=6", "safetensors>=0.5", "tqdm>=4.66"],
    extras_require={
        "text": TEXT,
        "video": VIDEO,
        "train": TRAIN,
        "convert": CONVERT,
        "all": TEXT + VIDEO + TRAIN + DEMO + CONVERT,
        "test": TEXT + VIDEO + TRAIN + DEMO + CONVERT + TEST,
    },
)
