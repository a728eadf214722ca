"""Other people's training loops. Nothing here is imported by the package itself."""
