"""Reports of runs and of prepared data, as HTML pages with pictures."""
