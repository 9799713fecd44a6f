"""Many runs of one file: a grid of values, a search, or both; on Ray, or one after the other."""
