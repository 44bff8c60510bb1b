"""dha.ista (Eq. 4). Oracles: the conditions of optimality (KKT), answers that are known."""

import math

import pytest
import torch

import dha


def random(*shape):
    return torch.rand(*shape, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("kind", ["random", "near a column", "columns repeat", "zero columns"])
def test_ista_solves_the_lasso(kind, scale):
    """A batch for each of 14 to 35 candidates, and the mobile space's, in a few hundred rounds."""
    for m, n in ((7, 14), (7, 21), (7, 28), (7, 35), (3, 7)):
        A, b = random(8, m, n), scale * torch.randn(8, m, dtype=torch.float64)
        if kind == "near a column":
            b = scale * (A[..., n // 2] + 0.02 * torch.randn_like(b))
        elif kind == "columns repeat":
            A[..., n // 2 : n // 2 + 3] = A[..., :3]
        elif kind == "zero columns":
            A[..., 3] = A[..., n - 2 :] = 0
        alpha = dha.ista(A, b, 1e-5, rounds=300)

        # A_i^T (b - A alpha) = lam sign(alpha_i) where alpha_i is not 0, and within +-lam elsewhere
        slope = torch.einsum("pmn,pm->pn", A, b - torch.einsum("pmn,pn->pm", A, alpha))
        on = alpha != 0
        error = torch.where(on, (slope - 1e-5 * alpha.sign()).abs(), (slope.abs() - 1e-5).clamp(min=0))
        assert (error.amax(1) <= 1.01e-9 * torch.einsum("pmn,pm->pn", A, b).abs().amax(1)).all()
        assert on.any(1).all() and not (on & (A == 0).all(1)).any()


def test_ista_known_answers():
    b = torch.tensor([3.0, -0.5, 0.2], dtype=torch.float64)
    soft = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)  # for A = I: the shrinkage operator
    torch.testing.assert_close(dha.ista(torch.eye(3, dtype=torch.float64), b, 1.0), soft)
    assert torch.equal(dha.soft_threshold(b, torch.tensor(0.25)), torch.tensor([2.75, -0.25, 0.0]).double())
    assert torch.equal(dha.ista(torch.rand(7, 14), torch.zeros(7), 1e-5), torch.zeros(14))
    assert torch.equal(dha.ista(torch.rand(7, 14), torch.randn(7), 1e3), torch.zeros(14))  # lam above max |A^T b|


def test_ista_of_padded_problems_in_more_dimensions():
    A, b = random(2, 3, 7, 14), torch.randn(2, 3, 7, dtype=torch.float64)
    alpha = dha.ista(torch.cat([A, torch.zeros(2, 3, 7, 21)], -1), b, 1e-5)
    assert alpha.shape == (2, 3, 35) and not alpha[..., 14:].any()
    torch.testing.assert_close(alpha[..., :14], dha.ista(A, b, 1e-5), rtol=0, atol=1e-6)
    assert torch.equal(
        dha.ista(A.float(), b.float(), 1e-5), dha.ista(A.float().double(), b.float().double(), 1e-5).float()
    )
    with pytest.raises(ArithmeticError, match="did not converge"):
        dha.ista(A, b, 1e-5, rounds=1)


@pytest.mark.parametrize("A, b, lam", [(1.0, 1, 0.1), (1.0, math.nan, 0.1), (math.inf, 1.0, 0.1), (1.0, 1.0, math.nan)])
def test_ista_refuses_numbers_without_a_solution(A, b, lam):
    """And a b of integers."""
    with pytest.raises(ValueError, match="finite numbers"):
        dha.ista(torch.full((7, 14), A), torch.full((7,), b), lam)
