"""Block scaling under torch.compile gives the eager bits, short last blocks included."""

import shutil

import pytest
import torch

from altgrad.quantization import BLOCK_FORMATS, block_quantize

ALL = list(BLOCK_FORMATS)


def test_compiles_to_the_same_bits():
    x = torch.randn(5, 70)
    for name in ALL:
        traced = torch.compile(lambda t, name=name: block_quantize(t, name), fullgraph=True, backend="aot_eager")
        assert torch.equal(traced(x).view(torch.int32), block_quantize(x, name).view(torch.int32))
        torch.compiler.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")
@pytest.mark.parametrize("shape", [(40,), (5, 70)])
def test_inductor_writes_short_last_blocks_too(shape):
    x = torch.randn(shape)
    traced = torch.compile(lambda t: block_quantize(t, "MXFP8_E4M3"), fullgraph=True)
    assert torch.equal(traced(x).view(torch.int32), block_quantize(x, "MXFP8_E4M3").view(torch.int32))
    torch.compiler.reset()
