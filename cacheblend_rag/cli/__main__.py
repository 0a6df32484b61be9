"""``python -m cacheblend_rag.cli``."""

from cacheblend_rag.cli import main

main()
