"""From gradients to weights: what is kept of each parameter, what waits, and the one place where a weight changes."""
