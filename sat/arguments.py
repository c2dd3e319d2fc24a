"""SAT's argument groups and its seeding, for users' own scripts. This project's scripts read YAML (`sat.config`)."""

import random
from argparse import ArgumentParser

import numpy
import torch

from sat.compat.sat_flags import FLAGS

__all__ = [
    "add_data_args",
    "add_evaluation_args",
    "add_model_config_args",
    "add_text_generate_args",
    "add_tokenization_args",
    "add_training_args",
    "set_random_seed",
]


def _add_group(parser: ArgumentParser, title: str) -> ArgumentParser:
    group = parser.add_argument_group(title)
    for flag, options in FLAGS[title].items():
        group.add_argument(flag, **options)
    return parser


def add_model_config_args(parser: ArgumentParser) -> ArgumentParser:
    """Sizes and switches of the transformer."""
    return _add_group(parser, "model")


def add_training_args(parser: ArgumentParser) -> ArgumentParser:
    """Length, optimizer, precision, saving and logging of a training run."""
    return _add_group(parser, "training")


def add_evaluation_args(parser: ArgumentParser) -> ArgumentParser:
    """When and on how much to evaluate."""
    return _add_group(parser, "evaluation")


def add_data_args(parser: ArgumentParser) -> ArgumentParser:
    """Paths of the data, and how they are loaded."""
    return _add_group(parser, "data")


def add_tokenization_args(parser: ArgumentParser) -> ArgumentParser:
    """The tokenizer's name."""
    return _add_group(parser, "tokenization")


def add_text_generate_args(parser: ArgumentParser) -> ArgumentParser:
    """Decoding of text."""
    return _add_group(parser, "text generation")


def set_random_seed(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch; this package's training draws from none of them."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # noqa: NPY002 (users' code draws from the global generator)
    torch.manual_seed(seed)
