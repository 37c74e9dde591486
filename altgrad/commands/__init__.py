"""What the commands do, apart from how they are called (`altgrad.cli`): a file per topic."""
