"""The pages, a file for each: components on top, below them what happens."""
