"""The table of devices, and rates measured here."""

import pytest
import torch

from sat.errors import ConfigError
from sat.training.devices import find_device, matrix_tflops, named_device, peak_tflops


def test_peaks_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_tflops(torch.device("cpu"), "bf16") is None
    for name, half, single in (
        ("NVIDIA H100 80GB HBM3", 989.0, 67.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA H20", 148.0, 44.0),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert [peak_tflops(torch.device("cuda", 0), precision) for precision in ("bf16", "fp16", "fp32")] == [
            half,
            half,
            single,
        ]


def test_the_smaller_of_two_devices_of_a_name() -> None:
    small, large = find_device("NVIDIA A100-SXM4-40GB"), find_device("NVIDIA A100-SXM4-80GB")
    assert small is not None and large is not None and small.memory_gib < 40 < large.memory_gib
    assert find_device("Some other GPU") is None


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"device 'h201' is not known; did you mean 'h20.*'.*there are b200, h200"):
        named_device("h201")


def test_the_rate_of_products() -> None:
    assert 1e-4 < matrix_tflops(torch.device("cpu"), "fp32", size=256) < 100
