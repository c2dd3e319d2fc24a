"""Adapters: small trained parts on a frozen model."""
