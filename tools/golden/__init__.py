"""Replaying recorded reference numbers: one module for each set of recordings, `runner` for the command."""
