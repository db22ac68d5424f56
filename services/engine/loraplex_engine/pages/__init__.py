"""The pool's pages: which owner has which page, what cached blocks hold, and what a page is worth at an eviction."""
