"""The decomposition behind an exported LoRA: small singular values resolved, ranks not raised by rounding."""

import pytest
import torch

from peft_edit.export import EXACT, Spectrum

from .random_adapters import apart


@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (64, 64)])
def test_singular_values_far_below_the_largest_are_resolved(shape):
    """Down to 1e-7 of the largest, although the eigenvalues of the Gram matrix would be lost at 1e-14."""
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(shape[0], 12, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], 12, dtype=torch.float64))
    values = 10.0 ** torch.linspace(0, -7, 12, dtype=torch.float64)
    delta = left * values @ right.T
    spectrum = Spectrum.of(delta)
    torch.testing.assert_close(spectrum.energies[:12].sqrt(), values, rtol=1e-2, atol=0)
    assert values[9:].norm() > EXACT * values.norm() > values[10:].norm() and spectrum.exact_rank == 10
    for rank in (1, 6, 11, 12):
        down, up = spectrum.factors(delta, rank)
        assert down.shape == (rank, shape[1]) and up.shape == (shape[0], rank)
        assert apart(up @ down, delta) == pytest.approx(float(values[rank:].norm() / values.norm()), abs=2e-8)
        torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0), rtol=1e-2, atol=0)


def test_rounding_to_float32_adds_no_rank():
    torch.manual_seed(0)
    delta = torch.randn(160, 12) @ torch.randn(12, 1024)
    assert Spectrum.of(delta).exact_rank == 12
