"""What a sweep is: its axes, what is left out of their product, and the trials that follow."""
