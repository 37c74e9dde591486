"""Which trials go on: races, populations, guards, and the order in which trials start."""
