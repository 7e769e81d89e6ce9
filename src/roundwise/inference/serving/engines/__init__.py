"""Generates answers: one request at a time, or several together, behind one queue."""
