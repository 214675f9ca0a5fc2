"""One block kind a file: its parameters, its cache and one pure function."""
