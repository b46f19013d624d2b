"""From raw data sets and photos to the prepared layout on disk."""
