"""Where trials run: Ray, its workers and nodes, and what is checked before anything starts."""
