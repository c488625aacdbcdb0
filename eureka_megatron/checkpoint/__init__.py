"""A run's own state on disk: the folder, who writes it, what is kept."""
