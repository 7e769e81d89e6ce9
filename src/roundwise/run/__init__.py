"""The run: from prepared plan to finished checkpoint."""
