"""Real text, a small transformer and a pretrained checkpoint for demonstrations and comparisons."""
