"""What judges the package and is imported by its tests only."""
