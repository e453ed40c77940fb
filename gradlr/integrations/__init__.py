"""Thin integrations with trainers, each with a dependency of its own: import the one you use, `gradlr` imports none."""
