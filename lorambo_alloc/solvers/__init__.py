"""One algorithm a file: a Problem in, an Allocation out."""
