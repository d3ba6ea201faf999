"""Solve sums of tables and integer programs exactly."""
