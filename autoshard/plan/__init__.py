"""Plans and strategies (one schema), their files, and clusters."""
