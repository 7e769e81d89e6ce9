"""Formats that models are published in, read as dense weights."""
