"""Procedures that drive a stock pipeline from outside."""
