"""Transports, which carry collectives: every rank in this process, or one rank per process."""
