"""What a checkpoint is: opening, mapping names to modules, formats, writing, auditing."""
