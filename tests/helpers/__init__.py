"""What several tests and the full matrix share."""
