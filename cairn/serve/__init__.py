"""A learner over HTTP, and a page for people."""
