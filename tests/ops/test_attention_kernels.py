"""The kernel of attention: choosing it, refusing one that is not there, and on a GPU that all agree."""

import logging

import pytest
import torch
import torch.nn.functional as F

from sat.errors import ConfigError
from sat.ops.attention_kernels import KERNELS, AttentionWork, attention_kernel, fastest, has_flash3, time_kernels, using

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
def test_kernels_agree_and_one_is_chosen() -> None:
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
