"""What quantizing layers costs: quality by level, and the order in which layers should go."""
