"""Checkpoints: files and folders that are written whole and loaded whole."""
