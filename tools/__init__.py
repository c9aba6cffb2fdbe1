"""What developers run: check, bench."""
