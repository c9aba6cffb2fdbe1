"""One file a task: rows in, what the engine is asked, what is made of its answers."""
