"""`--attention`: kernels of an installed package, which PyTorch then prefers to all others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend

from opensora.acceleration import flash_attention
from opensora.acceleration.flash_attention import use_attention
from opensora.errors import ConfigError

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not hasattr(torch.nn.attention, "list_flash_attention_impls"), reason="older")


@pytest.fixture
def activated() -> Iterator[list[str]]:
    """The names of the implementations that were activated; one that cannot be is BROKEN."""
    names: list[str] = []

    def broken() -> None:
        raise ModuleNotFoundError("No module named 'some_kernels'")

    torch.nn.attention.register_flash_attention_impl("GOOD", register_fn=lambda: names.append("GOOD"))
    torch.nn.attention.register_flash_attention_impl("BROKEN", register_fn=broken)
    before = order()
    yield names
    flash_attention._preference.close()
    torch._C._set_sdp_priority_order(before)


def order() -> list[int]:
    return torch._C._get_sdp_priority_order()


def test_an_installed_package_is_activated_and_preferred(activated: list[str]) -> None:
    """On some devices PyTorch would call cuDNN instead, and the package never."""
    cudnn = SDPBackend.CUDNN_ATTENTION.value
    torch._C._set_sdp_priority_order([cudnn, *(one for one in order() if one != cudnn)])  # as the first call on an H100
    use_attention(None, CPU)
    assert not activated and order()[0] == cudnn
    use_attention("GOOD", CPU)
    assert activated == ["GOOD"]
    assert order()[0] == SDPBackend.FLASH_ATTENTION.value
    assert torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    use_attention("GOOD", CPU)  # of another pipeline
    assert order()[0] == SDPBackend.FLASH_ATTENTION.value


def test_what_cannot_be_activated_is_refused(activated: list[str]) -> None:
    before = order()
    with pytest.raises(ConfigError, match=r"attention 'BROKEN' cannot be used here .*some_kernels.*; remove it"):
        use_attention("BROKEN", CPU)
    with pytest.raises(ConfigError, match=r"attention 'GODO' is not known to PyTorch .*; it knows BROKEN, .*GOOD"):
        use_attention("GODO", CPU)
    assert order() == before
