"""The exception that every error of Meshwright is."""

from __future__ import annotations


class MeshwrightError(Exception):
    """The base of every error that Meshwright raises on purpose."""
