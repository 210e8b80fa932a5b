"""What the scripts in the root use. Arrows point down: a script uses this package, which is handed its model."""
