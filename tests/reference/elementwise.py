"""Naive float64 references of the rules for vectors (AdamW) and tables (row-wise RMSprop)."""

import numpy as np


class AdamReference:
    def __init__(self, weight, lr, beta, beta2=0.999, eps=1e-8, weight_decay=0.0):
        self.weight = np.array(weight, dtype=np.float64)
        self.lr = lr
        self.beta = beta
        self.beta2 = beta2
        self.eps = eps
        self.weight_decay = weight_decay
        self.m = np.zeros_like(self.weight)
        self.v = np.zeros_like(self.weight)
        self.t = 0

    def step(self, gradient):
        G = np.array(gradient, dtype=np.float64)
        self.t += 1
        self.m = self.beta * self.m + (1 - self.beta) * G
        self.v = self.beta2 * self.v + (1 - self.beta2) * G**2
        m_hat = self.m / (1 - self.beta**self.t)
        v_hat = self.v / (1 - self.beta2**self.t)
        self.weight *= 1 - self.lr * self.weight_decay
        self.weight -= self.lr * m_hat / (np.sqrt(v_hat) + self.eps)


class RowwiseRMSpropReference:
    def __init__(self, weight, lr, beta2=0.99, eps=1e-8, weight_decay=0.0):
        self.weight = np.array(weight, dtype=np.float64)
        self.lr = lr
        self.beta2 = beta2
        self.eps = eps
        self.weight_decay = weight_decay
        self.v = np.zeros(self.weight.shape[0])  # one second moment per row
        self.t = 0

    def step(self, gradient):
        G = np.array(gradient, dtype=np.float64)
        self.t += 1
        self.v = self.beta2 * self.v + (1 - self.beta2) * (G**2).mean(axis=1)
        v_hat = self.v / (1 - self.beta2**self.t)
        self.weight *= 1 - self.lr * self.weight_decay
        self.weight -= self.lr * G / (np.sqrt(v_hat)[:, None] + self.eps)
