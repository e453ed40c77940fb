"""Naive float64 reference of the factor moments rule: moments of the factors U, S, V of each gradient.

W, G are m × n, r is the rank; nothing here is shared with the package.
"""

import numpy as np


def svd_lowrank(G, gaussian):
    """Randomized SVD with two subspace iterations as in torch.svd_lowrank; `gaussian` (min(m, n) × r) is its test matrix."""
    m, n = G.shape
    A = G.T if m < n else G
    Q = np.linalg.qr(A @ gaussian)[0]
    for _ in range(2):
        Q = np.linalg.qr(A.T @ Q)[0]
        Q = np.linalg.qr(A @ Q)[0]
    U, S, Vt = np.linalg.svd(Q.T @ A, full_matrices=False)
    U, V = Q @ U, Vt.T
    return (V, S, U) if m < n else (U, S, V)


def newton_schulz(X, steps):
    """Approximate orthogonalization of X by the quintic Newton–Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = X.shape[0] > X.shape[1]
    if tall:
        X = X.T
    X = X / (np.sqrt((X * X).sum()) + 1e-7)
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if tall else X


def resized(moment, rank):
    """The leading `rank` entries along the last axis, padded with zeros where there are fewer."""
    result = np.zeros((*moment.shape[:-1], rank))
    kept = min(rank, moment.shape[-1])
    result[..., :kept] = moment[..., :kept]
    return result


class FactorMomentsReference:
    def __init__(self, weight, *, rank, lr, beta, beta2=0.999, eps=1e-8, scale=1.0, weight_decay=0.0, adjust=False, ns_steps=5):
        self.weight = np.array(weight, dtype=np.float64)
        m, n = self.weight.shape
        self.rank = rank
        self.lr = lr
        self.beta = beta
        self.beta2 = beta2
        self.eps = eps
        self.scale = scale
        self.weight_decay = weight_decay
        self.adjust = adjust
        self.ns_steps = ns_steps
        self.m_U = np.zeros((m, rank))
        self.m_V = np.zeros((n, rank))
        self.m_S = np.zeros(rank)
        self.v_S = np.zeros(rank)
        self.t = 0

    def set_rank(self, rank):
        self.rank = rank
        self.m_U, self.m_V = resized(self.m_U, rank), resized(self.m_V, rank)
        self.m_S, self.v_S = resized(self.m_S, rank), resized(self.v_S, rank)

    def carry(self, U, V):
        """Carry the old moments into the new singular basis by one common rotation Q."""
        left, _, right_t = np.linalg.svd(self.m_U.T @ U + self.m_V.T @ V)
        Q = left @ right_t
        self.m_U, self.m_V = self.m_U @ Q, self.m_V @ Q
        self.m_S, self.v_S = (Q * Q).T @ self.m_S, (Q * Q).T @ self.v_S

    def step(self, gradient, gaussian, rank=None, align=None):
        """One step; `align` is a function (U, V) -> (U, V) by which a test may fix the signs of the singular vectors."""
        G = np.array(gradient, dtype=np.float64)
        gaussian = np.array(gaussian, dtype=np.float64)
        if rank is not None:
            self.set_rank(rank)
        assert G.shape == self.weight.shape and gaussian.shape == (min(G.shape), self.rank)
        assert self.rank <= min(G.shape)

        U, S, V = svd_lowrank(G, gaussian)
        if align is not None:
            U, V = align(U, V)
        if self.adjust and self.t > 0:
            self.carry(U, V)

        self.t += 1
        self.m_U = self.beta * self.m_U + (1 - self.beta) * U
        self.m_V = self.beta * self.m_V + (1 - self.beta) * V
        self.m_S = self.beta * self.m_S + (1 - self.beta) * S
        self.v_S = self.beta2 * self.v_S + (1 - self.beta2) * S**2
        mean = self.m_S / (1 - self.beta**self.t)
        square = self.v_S / (1 - self.beta2**self.t)
        s_hat = mean / (np.sqrt(square) + self.eps)

        O_U, O_V = newton_schulz(self.m_U, self.ns_steps), newton_schulz(self.m_V, self.ns_steps)
        self.weight *= 1 - self.lr * self.weight_decay
        self.weight -= self.lr * self.scale * (O_U @ np.diag(s_hat) @ O_V.T)
