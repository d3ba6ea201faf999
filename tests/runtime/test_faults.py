"""Every mishap in every phase of a run: nobody hangs, and everyone says what happened to whom."""

from __future__ import annotations
