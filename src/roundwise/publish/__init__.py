"""Makes a finished checkpoint ready for others: its model card, and its way to the hub."""
