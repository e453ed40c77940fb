"""Naive float64 reference of the low-rank polar rule: one matrix, exact decompositions, nothing shared with the package.

W, G, M = P Rᵀ are m × n; r is the rank of the update, k the rank of the momentum that is kept, 0 for none.
"""

import numpy as np


def orthonormal(Y):
    """Gram-Schmidt on the columns of Y, one after the other; a column that depends on those before it becomes zero."""
    Q, T = np.linalg.qr(Y)
    lengths = np.linalg.norm(Y, axis=0)
    diagonal = np.diag(T)
    return np.where(np.abs(diagonal) > 1e-13 * lengths, Q * np.sign(diagonal), 0.0)


def newton_schulz(N, steps=5):
    """Muon's five steps on the singular values of N, whose Frobenius norm is made one first."""
    if not np.any(N):
        return N
    U, s, Vt = np.linalg.svd(N, full_matrices=False)
    s = s / np.sqrt((s * s).sum())
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U @ np.diag(s) @ Vt


def unit_rows(E):
    """Every row divided by its length; rows of zero length stay zero."""
    length = np.sqrt((E * E).sum(axis=1, keepdims=True))
    return E / np.where(length > 0, length, 1.0)


def spread(E, norm):
    """Multi-normalization: rows, then columns, to unit length, three times; then to the Frobenius norm given."""
    for _ in range(3):
        E = unit_rows(E)
        E = unit_rows(E.T).T
    return E * (norm / np.sqrt((E * E).sum()))


class LowRankPolarReference:
    def __init__(self, weight, *, rank, momentum_rank, lr, beta, weight_decay=0.0, residual=0.5):
        self.weight = np.array(weight, dtype=np.float64)
        m, n = self.weight.shape
        self.rank = rank
        self.momentum_rank = momentum_rank
        self.lr = lr
        self.beta = beta
        self.weight_decay = weight_decay
        self.residual = residual
        self.P = np.zeros((m, momentum_rank))
        self.R = np.zeros((n, momentum_rank))

    def test_matrix(self, gaussian):
        """X: the columns of R, of unit length, and Gaussian ones behind them and where R has none."""
        X = np.array(gaussian, dtype=np.float64) / np.sqrt(self.weight.shape[1])
        peaks = np.abs(self.R).max(axis=0)
        for j in range(min(self.momentum_rank, self.rank)):
            if peaks[j] > 1e-5 * peaks.max():
                X[:, j] = self.R[:, j] / np.linalg.norm(self.R[:, j])
        return X

    def leading(self, B, Z):
        """Two power steps on ZᵀZ from where P lies in B; unit vectors where it has no column yet."""
        C = (B.T @ self.P)[:, : self.rank]
        for j in range(C.shape[1]):
            if not np.any(C[:, j]):
                C[j, j] = 1.0
        for _ in range(2):
            C = orthonormal(Z.T @ Z @ C)
        return np.pad(C, ((0, 0), (0, self.momentum_rank - C.shape[1])))

    def step(self, gradient, gaussian):
        G = np.array(gradient, dtype=np.float64)
        m, n = self.weight.shape
        assert G.shape == (m, n) and gaussian.shape == (n, self.rank)

        A = G + self.beta * self.P @ self.R.T
        B = orthonormal(A @ self.test_matrix(gaussian))
        Z = A.T @ B
        D = B @ newton_schulz(G.T @ B + self.beta * Z).T
        if self.residual > 0:
            E = G - B @ (B.T @ G)
            open_directions = min(m, n) - self.rank
            if open_directions > 0 and np.abs(E).max() > 5e-13 * np.abs(G).max():
                D = D + self.residual * spread(E, np.sqrt(open_directions))
        if not np.any(G):
            D = np.zeros((m, n))

        self.weight *= 1 - self.lr * self.weight_decay
        # A root mean square of two, had every direction its full length.
        squares = self.rank + self.residual**2 * (min(m, n) - self.rank)
        self.weight -= self.lr * 2 * np.sqrt(m * n / squares) * D
        if self.momentum_rank == 0:
            return
        C = self.leading(B, Z)
        self.P, self.R = B @ C, Z @ C
