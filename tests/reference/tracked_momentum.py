"""Naive float64 reference of the tracked momentum rule: dense momentum, full SVDs, nothing shared with the package.

W, G, M are m × n; r is the rank of the update, k the rank of the momentum that is kept.
"""

import numpy as np


def orthonormal_range(Y):
    """Orthonormal basis of the range of Y; directions under 1e-12 of the largest are dropped."""
    U, s, _ = np.linalg.svd(Y, full_matrices=False)
    return U[:, (s > 0) & (s > 1e-12 * s[0])]


def best_approximation(A, k):
    """Best approximation of A among the matrices of rank at most k."""
    U, s, Vt = np.linalg.svd(A, full_matrices=False)
    return U[:, :k] @ np.diag(s[:k]) @ Vt[:k]


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


class TrackedMomentumReference:
    def __init__(
        self, weight, *, rank, momentum_rank, lr, beta, weight_decay=0.0, residual=0.0, weigh=False, beta2=0.999, eps=1e-8
    ):
        self.weight = np.array(weight, dtype=np.float64)
        self.rank = rank
        self.momentum_rank = momentum_rank
        self.lr = lr
        self.beta = beta
        self.weight_decay = weight_decay
        self.residual = residual
        self.weigh = weigh
        self.beta2 = beta2
        self.eps = eps
        self.momentum = np.zeros_like(self.weight)
        self.v = np.zeros(rank)  # second moments of the singular values, used by weigh only
        self.t = 0

    def test_matrix(self, gaussian):
        """X: the right singular vectors of M (at most k, nonzero singular values only), Gaussian columns elsewhere."""
        _, s, Vt = np.linalg.svd(self.momentum, full_matrices=False)
        X = np.array(gaussian, dtype=np.float64) / np.sqrt(self.weight.shape[1])
        for j in range(min(self.momentum_rank, self.rank, len(s))):
            if s[j] > 0 and s[j] > 1e-12 * s[0]:
                X[:, j] = Vt[j]
        return X

    def direction(self, B, N):
        """B polar(N)ᵀ, or with weigh B (Σ w_i u_i v_iᵀ)ᵀ over the singular triples of N, null directions masked."""
        if B.shape[1] > 0:
            U, s, Vt = np.linalg.svd(N, full_matrices=False)
        else:
            U, s, Vt = np.zeros((N.shape[0], 0)), np.zeros(0), np.zeros((0, 0))
        padded = np.zeros(self.rank)
        padded[: len(s)] = s
        if self.weigh:
            self.v = self.beta2 * self.v + (1 - self.beta2) * padded**2
            w = padded / (np.sqrt(self.v / (1 - self.beta2**self.t)) + self.eps)
        else:
            w = np.ones(self.rank)
        null = (padded == 0) | (padded < 1e-5 * padded[0])
        w[null] = 0.0
        return B @ (U @ np.diag(w[: len(s)]) @ Vt).T

    def step(self, gradient, gaussian):
        G = np.array(gradient, dtype=np.float64)
        m, n = self.weight.shape
        assert G.shape == (m, n) and gaussian.shape == (n, self.rank)
        self.t += 1

        A = self.beta * self.momentum + G
        B = orthonormal_range(A @ self.test_matrix(gaussian))
        R = (B.T @ A).T
        N = (B.T @ G).T + self.beta * R

        D = self.direction(B, N)
        if self.residual > 0:
            E = G - B @ (B.T @ G)
            if np.any(np.abs(E) >= 1e-6 * np.abs(G).max()) and np.any(E):
                D = D + self.residual * spread(E, np.sqrt(max(min(m, n) - self.rank, 0)))
        if not np.any(G):
            D = np.zeros((m, n))

        self.weight *= 1 - self.lr * self.weight_decay
        self.weight -= self.lr * 0.2 * np.sqrt(max(m, n)) * D
        self.momentum = best_approximation(B @ R.T, self.momentum_rank)
