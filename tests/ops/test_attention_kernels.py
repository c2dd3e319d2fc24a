"""The kernel of attention: choosing it, refusing one that is not there, and on a GPU that all agree."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sat.errors import ConfigError
from sat.ops import attention_kernels
from sat.ops.attention_kernels import (
    KERNELS,
    AttentionWork,
    agreed_times,
    attention_kernel,
    fastest,
    has_flash3,
    time_kernels,
    using,
)
from tests.ranks import run_ranks

ON_CPU = AttentionWork(2, 64, 16, torch.float32, torch.device("cpu"))
ON_GPU = AttentionWork(8, 1024, 64, torch.bfloat16, torch.device("cuda"))


def test_the_fastest_is_taken_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert fastest({"flash": 0.004, "cudnn": 0.003, "efficient": 0.01}) == "cudnn"
    assert "attention: cudnn (cudnn 3.00 ms, flash 4.00 ms, efficient 10.00 ms)" in caplog.text
    assert fastest({}) == "flash"


def test_a_cpu_has_one_kernel() -> None:
    with attention_kernel("auto", ON_CPU) as name:
        assert name == "torch"
    with pytest.raises(ConfigError, match=r"attention is 'cudnn', a kernel for GPUs, and this is a cpu; give auto"):
        attention_kernel("cudnn", ON_CPU).__enter__()


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that times are kept in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sat-video" / "attention.json"


class Stopwatch:
    """Times of kernels that nobody has run, and how often they were asked for."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self, work: AttentionWork) -> dict[str, float]:
        self.calls += 1
        return self.seconds


def test_times_are_taken_once_for_the_same_work(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, later = Stopwatch(flash=0.002, cudnn=0.001), Stopwatch(flash=0.001)
    assert agreed_times(ON_CPU, first) == (first.seconds, None)
    assert agreed_times(ON_CPU, later) == (first.seconds, kept)
    with caplog.at_level(logging.INFO):
        assert fastest(*agreed_times(ON_CPU, later)) == "cudnn"
    assert f"attention: cudnn (cudnn 1.00 ms, flash 2.00 ms; from {kept})" in caplog.text
    assert (first.calls, later.calls) == (1, 0) and [file.name for file in kept.parent.iterdir()] == [kept.name]


@pytest.mark.parametrize(
    "other",
    [
        {"heads": 3},
        {"tokens": 65},
        {"head_dim": 32},
        {"dtype": torch.bfloat16},
        {"device": torch.device("meta")},
    ],
    ids=str,
)
def test_other_work_has_times_of_its_own(kept: Path, other: dict[str, Any]) -> None:
    agreed_times(ON_CPU, Stopwatch(flash=0.002))
    stopwatch = Stopwatch(cudnn=0.001)
    assert agreed_times(replace(ON_CPU, **other), stopwatch) == (stopwatch.seconds, None)
    assert len(json.loads(kept.read_text())) == 2


def test_times_are_of_one_torch_and_of_the_kernels_that_there_are(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agreed_times(ON_CPU, Stopwatch(flash=0.002))
    for module, name, value in ((torch, "__version__", "9.9"), (attention_kernels, "has_flash3", lambda: True)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert agreed_times(ON_CPU, Stopwatch(flash=0.001))[1] is None


def test_all_long_clips_are_timed_as_one(kept: Path) -> None:
    agreed_times(replace(ON_CPU, tokens=17_776), Stopwatch(flash=0.002))
    assert agreed_times(replace(ON_CPU, tokens=45_104), Stopwatch(flash=0.001))[1] == kept


@pytest.mark.parametrize(
    "text", ["", '{"a": ', "[1]", "KEY: 3", "KEY: {}", 'KEY: {"flash": "fast"}', 'KEY: {"x": 1.0}']
)
def test_a_broken_file_is_replaced(kept: Path, text: str) -> None:
    agreed_times(ON_CPU, Stopwatch(flash=0.002))
    (key,) = json.loads(kept.read_text())
    kept.write_text("{" + text.replace("KEY", json.dumps(key)) + "}" if "KEY" in text else text)
    again = Stopwatch(efficient=0.003)
    assert agreed_times(ON_CPU, again) == (again.seconds, None)
    assert agreed_times(ON_CPU, again) == (again.seconds, kept)


def test_a_folder_that_cannot_be_written_is_no_error(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept.parent.parent.write_text("a file where the folder would be")
    stopwatch = Stopwatch(flash=0.002)
    assert agreed_times(ON_CPU, stopwatch) == (stopwatch.seconds, None)
    assert f"the times of kernels cannot be kept in {kept}" in caplog.text


def test_nothing_is_kept_where_no_kernel_takes_the_work(kept: Path) -> None:
    assert agreed_times(ON_CPU, Stopwatch()) == ({}, None)
    assert not kept.exists()


def times_on_rank(rank: int, folder: str) -> tuple[dict[str, float], Path | None, int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", f"{folder}/{rank}")
        stopwatch = Stopwatch(flash=1.0 + rank)
        return *agreed_times(ON_CPU, stopwatch), stopwatch.calls


def test_the_first_rank_decides_for_all(tmp_path: Path) -> None:
    assert run_ranks(times_on_rank, 2, str(tmp_path)) == [({"flash": 1.0}, None, 1), ({"flash": 1.0}, None, 0)]
    assert [folder.name for folder in tmp_path.iterdir()] == ["0"]


@pytest.mark.skipif(has_flash3(), reason="FlashAttention 3 is installed")
def test_flash3_needs_its_package() -> None:
    with pytest.raises(ConfigError, match=r"has the module flash_attn_interface, or give auto"):
        attention_kernel("flash3", ON_GPU).__enter__()


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "flash3"])
def test_a_preferred_kernel_leaves_results_and_settings_as_they_were(name: str) -> None:
    query, key, value = torch.randn(3, 1, 2, 9, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    before = torch._C._get_sdp_priority_order(), F.scaled_dot_product_attention(query, key, value)
    with using(name):
        torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value), before[1])
        assert torch._C._get_sdp_priority_order()[0] == int(KERNELS[name].value)
    assert torch._C._get_sdp_priority_order() == before[0]


@pytest.mark.gpu
def test_kernels_agree_and_one_is_chosen(kept: Path) -> None:
    query, key, value = torch.randn(3, 1, 8, 1024, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    with using("math"):
        expected = F.scaled_dot_product_attention(query, key, value)
    seconds = time_kernels(ON_GPU)
    assert seconds
    for name in seconds:
        with using(name):
            torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value), expected, atol=2e-2, rtol=0.0)
    with attention_kernel("auto", ON_GPU) as name:
        assert name in KERNELS
