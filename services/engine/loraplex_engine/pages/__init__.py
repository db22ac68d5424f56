"""The pool's pages: who owns which, what cached blocks hold, and what a page is worth when one must be evicted."""
